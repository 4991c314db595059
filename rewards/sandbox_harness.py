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


def take(read, fd, count):
    data = b""
    while len(data) < count:
        piece = read(fd, count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def take_text(read, fd, from_bytes=int.from_bytes):
    return take(read, fd, from_bytes(take(read, fd, 4), "big")).decode()


def module(name):
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made.__dict__


def run_tests(code, requests, replies):
    read, write, leave, execute, compile_ = os.read, os.write, os._exit, exec, compile
    take_text_, settrace, setprofile = take_text, sys.settrace, sys.setprofile
    wrong, is_callable, number = BaseException, callable, str
    pristine = dict(vars(builtins))
    names = module("solution")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    try:
        execute(compile_(code, "solution.py", "exec"), names)
    except wrong:
        leave(1)
    write(replies, b"ran\n")
    token = take_text_(read, requests)
    count = int(take_text_(read, requests))
    for index in range(count):
        test = take_text_(read, requests)
        passed = b"1"
        settrace(None)
        setprofile(None)
        vars(builtins).update(pristine)
        try:
            before = dict(names)
            execute(compile_(test, "test.py", "exec"), names)
            for name in [name for name in names if name.startswith("test")]:
                if name not in before and is_callable(names[name]):
                    names[name]()
        except wrong:
            passed = b"0"
        write(replies, token.encode() + b" " + number(index).encode() + b" " + passed + b"\n")
    leave(0)


def main():
    requests, replies = int(sys.argv[1]), int(sys.argv[2])
    sys.argv[:] = sys.orig_argv[:] = ["main.py"]
    os.write(replies, b"up\n")
    kind, code = take_text(os.read, requests), take_text(os.read, requests)
    if kind == "module":
        run_tests(code, requests, replies)
    os.close(requests)
    os.close(replies)
    exec(compile(code, "main.py", "exec"), module("__main__"))


main()
