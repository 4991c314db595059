"""Builds the sandbox around itself, then becomes the program to run. A program of the standard library alone.

    python -I -S sandbox_launcher.py JOB_FD STATUS_FD

reads a job (JSON, to the end of the stream) and writes to STATUS_FD `ready` before the program starts or `failed
REASON` where the sandbox cannot be had, and `exit CODE` after it ended (negative: killed by that signal). Neither
descriptor survives into the program.

With namespaces: network without an interface that is up, processes of its own (the program is process 1: when it ends
or the launcher dies, the kernel kills all the others), no System V memory of others, and a root that holds only the
folders of the job, read-only, and an empty /plait in memory. There is no /proc, so no environment of another process
to read. Started by root, the program gets a user id that nobody has; else it keeps its own, without any capability.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from typing import Any

_CLONE = (
    0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
)  # mounts, UTS, IPC, pids, net
_CLONE_NEWUSER = 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = (text.encode() if text else None for text in (source, target, kind))
    call(f"mount {target}", libc.mount(*texts, ctypes.c_ulong(flags), data.encode()))


def enter_namespaces() -> None:
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", libc.unshare(_CLONE if uid == 0 else _CLONE | _CLONE_NEWUSER))
    if uid != 0:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{uid} {uid} 1")
        write("/proc/self/gid_map", f"{gid} {gid} 1")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def build_root(job: dict[str, Any]) -> None:
    """A root in memory, on top of the job's folder, which stays empty for everybody else."""
    folder = job["folder"]
    mount("", "/", "", _MS_REC | _MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{folder}/old")
    pivot = _SYS_PIVOT_ROOT[os.uname().machine]
    call("pivot_root", libc.syscall(pivot, folder.encode(), f"{folder}/old".encode()))
    os.chdir("/")
    for path in (*job["visible"], *_DEVICES):
        show(path)
    os.mkdir("/plait")
    if not os.path.lexists("/tmp"):
        os.symlink("plait", "/tmp")
    call("umount", libc.umount2(b"/old", _MNT_DETACH))
    os.rmdir("/old")
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = libc.syscall(_SYS_MOUNT_SETATTR, -1, b"/", _AT_RECURSIVE, attributes, size)
    call("mount_setattr (needs Linux 5.12)", result)
    mount("tmpfs", "/plait", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={job['disk']},mode=777")
    os.chdir("/plait")


def show(path: str) -> None:
    """The same file, folder or link as outside; nothing where there is none."""
    source = "/old" + path
    if not os.path.lexists(source) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path)
    else:
        write(path, "")
    mount(source, path, "", _MS_BIND | _MS_REC)


def drop_root(uid: int) -> None:
    """From root to a user id that nobody has, so that the limit on processes counts this sandbox alone."""
    if os.geteuid() != 0:
        return
    os.setgroups([])
    try:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:  # inside a container that knows few numbers
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (allowed, allowed))


def die_with_parent() -> None:
    call("prctl", libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def become(job: dict[str, Any], uid: int, lifeline: int) -> None:
    """In the child: give up rights and run the program."""
    if job["namespaces"]:
        drop_root(uid)
    die_with_parent()  # after the change of user, which clears it
    if select.select([lifeline], [], [], 0)[0]:  # the launcher ended before the line above
        os._exit(1)
    call("prctl", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for source, target in job["descriptors"]:
        os.dup2(source, target)
        os.close(source)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    limit(job["limits"])


def main(job_fd: int, status_fd: int) -> None:
    with open(job_fd, "rb") as file:
        job = json.load(file)
    die_with_parent()
    if os.getppid() != job["parent"]:
        os._exit(1)
    os.set_inheritable(status_fd, False)
    uid = 1 << 30 | os.getpid()
    try:
        if job["namespaces"]:
            enter_namespaces()
            build_root(job)
        lifeline, held = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(held)
            become(job, uid, lifeline)
            os.write(status_fd, b"ready\n")
            os.execve(job["program"][0], job["program"], job["environment"])
    except (OSError, KeyError, ValueError) as error:
        os.write(status_fd, f"failed {error}\n".encode())
        os._exit(1)
    for source, _ in job["descriptors"]:
        os.close(source)
    os.closerange(0, 3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(status_fd, f"exit {code}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
