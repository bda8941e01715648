"""Runs one program of PostgreSQL as a child that cannot outlive the federation.

Run by path with `python -I -S`, so it imports nothing of ours and starts in milliseconds:

    launch.py PARENT_PID WATCH UID GID PROGRAM [ARGUMENT...]

WATCH says how the end of the parent is noticed, however it ends (SIGKILL included):

kernel  Linux. The kernel sends SIGINT (PostgreSQL's fast shutdown) when the parent ends; the
        launcher becomes the program and is gone.
guard   everywhere. Standard input is a pipe whose other end only the parent holds; the launcher
        stays beside the program and sends it SIGINT when the pipe ends.

It is a program of its own since little is safe between fork and exec in a process with threads.
"""

import ctypes
import os
import select
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""

CANNOT_RUN = 126
"""Exit status when the program was never started, as a shell would give it."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def become(uid: int, gid: int) -> None:
    """Give up root for good. Nothing happens when the process is that user already."""
    if (os.getuid(), os.geteuid()) == (uid, uid):
        return
    os.setgroups([gid])
    os.setgid(gid)
    os.setuid(uid)


def end_with(parent: int) -> None:
    """Ask the kernel for SIGINT at the parent's end; leave at once if that end has already come.

    The kernel forgets the request when a process changes its user, so this comes after `become`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != parent:
        sys.exit(CANNOT_RUN)


def run(command: list[str]) -> NoReturn:
    """Become the program, with signals as a fresh process has them.

    Python ignores SIGPIPE, and a shell's background job ignores SIGINT: both would be inherited.
    """
    for number in (*FORWARDED, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execv(command[0], command)  # noqa: S606 - to become it is the point


def guard(command: list[str]) -> int:
    """Run the program beside us, pass signals on to it, and stop it when standard input ends."""
    wakeups, wake = os.pipe()
    os.set_blocking(wakeups, False)
    os.set_blocking(wake, False)
    # Signals arrive as bytes in a pipe: one select waits for them and for the parent's end.
    signal.set_wakeup_fd(wake)
    for noticed in (*FORWARDED, signal.SIGCHLD):
        signal.signal(noticed, lambda *_: None)
    child = os.fork()
    if child == 0:
        _run_in_child(command)
    watched = [sys.stdin.fileno(), wakeups]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if wakeups in ready:
            for number in os.read(wakeups, 512):
                if number != signal.SIGCHLD:
                    os.kill(child, number)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 512):
            watched.remove(sys.stdin.fileno())
            os.kill(child, signal.SIGINT)


def _run_in_child(command: list[str]) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, sys.stdin.fileno())
        run(command)
    except OSError as error:
        complain(command, error)
    finally:
        os._exit(CANNOT_RUN)


def complain(command: list[str], error: OSError) -> None:
    """One line, in the form of PostgreSQL's own, for the log from which the supervisor quotes."""
    sys.stderr.write(f"FATAL:  cannot run {command[0]}: {error.strerror}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    parent, watch, uid, gid, *command = arguments
    os.umask(0o077)
    os.chdir("/")
    try:
        become(int(uid), int(gid))
        if watch == "guard":
            status = guard(command)
            return status if status >= 0 else 128 - status
        end_with(int(parent))
        run(command)
    except OSError as error:
        complain(command, error)
        return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
