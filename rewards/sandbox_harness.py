"""The first program inside the sandbox: runs a completion's code, then the tests. The standard library alone.

    python -I -c TEXT_OF_THIS_FILE REQUESTS_FD REPLIES_FD

It says `up`, reads one request (a script or a module), and for a script closes both descriptors and runs it as
__main__. For a module it runs the code with standard input and output closed off, says `ran`, and only then reads the
token and the tests; after each test it writes `TOKEN INDEX 1` or `0`. What it uses after the code ran was bound
before, and the builtins are put back, so that a completion that replaces `print`, `exec` or `os.write` changes
nothing here. Code that walks the frames of the interpreter in search of these names finds them: this is a fence
against cheating, not a proof.
"""

import builtins
import os
import sys
import types


def take(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def take_text(fd: int) -> str:
    return take(fd, int.from_bytes(take(fd, 4), "big")).decode()


def new_module(name: str) -> dict:
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made.__dict__


def run_tests(code: str, requests: int, replies: int) -> None:
    read, write, leave, execute, compile_ = os.read, os.write, os._exit, exec, compile
    settrace, setprofile, is_callable = sys.settrace, sys.setprofile, callable
    any_error, restore, pristine = BaseException, builtins.__dict__.update, dict(builtins.__dict__)
    names = new_module("solution")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    try:
        execute(compile_(code, "solution.py", "exec"), names)
    except any_error:
        leave(1)
    restore(pristine)
    settrace(None)
    setprofile(None)
    os.read = read
    write(replies, b"ran\n")
    token, count = take_text(requests), int(take_text(requests))
    for index in range(count):
        test, passed = take_text(requests), 1
        try:
            before = set(names)
            execute(compile_(test, "test.py", "exec"), names)
            for name in [n for n in names if n.startswith("test") and n not in before]:
                if is_callable(names[name]):
                    names[name]()
        except any_error:
            passed = 0
        restore(pristine)
        settrace(None)
        setprofile(None)
        os.read = read
        write(replies, f"{token} {index} {passed}\n".encode())
    leave(0)


def main() -> None:
    requests, replies = int(sys.argv[1]), int(sys.argv[2])
    sys.argv[:] = sys.orig_argv[:] = ["main.py"]
    os.write(replies, b"up\n")
    kind, code = take_text(requests), take_text(requests)
    if kind == "module":
        run_tests(code, requests, replies)
    os.close(requests)
    os.close(replies)
    exec(compile(code, "main.py", "exec"), new_module("__main__"))


main()
