"""Where programs of unknown origin run: bubblewrap, a clock, limits, a filter of system calls."""

import contextlib
import functools
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import warnings


class SandboxMissing(RuntimeError):
    """There is no bubblewrap that works here: the message says what to install."""


# -- the sandbox -----------------------------------------------------------------------------------------

OUTPUT = 16 << 20          # bytes a program may write, to stdout or to one file
SCRATCH = 32 << 20         # bytes of /tmp and of /dev/shm
PROCESSES = 8              # and threads, of a program
BASE = 64 << 20            # bytes of address space for the interpreter, beside the program's

# What runs in the sandbox. The first process keeps the clock, as the init of the namespace: when it ends, all
# do, and it leaves no orphan to the host. Its child is the program, with a few lines before and after, in the
# same interpreter. argv: kind, function, file descriptor of the program, seconds, bytes of memory, bytes of
# output, processes (0: no limit).
_HARNESS = r"""
import builtins, os, resource, signal, sys
kind, name, fd, seconds, *limits = sys.argv[1:]
fd, seconds, (memory, output, processes) = int(fd), float(seconds), map(int, limits)
sys.argv[:] = ["program.py"]
child = os.fork()
if child:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(124))
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
    while (ended := os.wait())[0] != child:
        pass
    code = os.waitstatus_to_exitcode(ended[1])
    os._exit(code if code >= 0 else 128 - code)
for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, output), (resource.RLIMIT_CORE, 0),
                   (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_NPROC, processes)):
    if what != resource.RLIMIT_NPROC or most:
        resource.setrlimit(what, (most, most))
resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
signal.setitimer(signal.ITIMER_PROF, seconds)
with open(fd, "rb") as file:
    source = file.read()
builtins.exit = builtins.quit = sys.exit
sys.stdout.reconfigure(errors="strict")
try:
    program = compile(source, "program.py", "exec", dont_inherit=True)
except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(121)
main = sys.modules["__main__"] = type(sys)("__main__")
try:
    if kind == "stdio":
        exec(program, main.__dict__)
    else:
        import json
        arguments, result = json.loads(sys.stdin.read()), os.dup(1)
        os.dup2(2, 1)
        if b"Solution" in source:
            for module in ("typing", "collections", "functools", "itertools", "math", "heapq", "bisect"):
                exec(f"import {module}\nfrom {module} import *", main.__dict__)
        main.__name__ = "program"
        exec(program, main.__dict__)
        if name:
            function = main.__dict__.get(name) or getattr(main.Solution(), name)
        else:
            function = main.__dict__[source.partition(b"(")[0].split()[-1].decode()]
        def plain(value):
            kind = type(value)
            if kind in (list, tuple):
                return [plain(item) for item in value]
            if kind is dict and all(type(key) in (str, int) for key in value):
                return {str(key): plain(item) for key, item in value.items()}
            if value is None or kind in (bool, int, float, str):
                return value
            print(f"returned a {kind.__name__}, which JSON does not have", file=sys.stderr, flush=True)
            os._exit(123)
        text = json.dumps(plain(function(*arguments))).encode()
        while text:
            text = text[os.write(result, text):]
        os._exit(0)
except MemoryError:
    os._exit(122)
"""


# System calls that get memory past the limits, or reach far into the kernel: numbers on x86_64, on aarch64.
REFUSED = {
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "ptrace": (101, 117),
    "add_key": (248, 217), "keyctl": (250, 219), "perf_event_open": (298, 241), "memfd_create": (319, 279),
    "bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "memfd_secret": (447, 447)}


@functools.cache
def bubblewrap():
    """((arguments of bubblewrap, a Python for the sandbox), "") or (None, why there is none)."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None, "bubblewrap is not installed"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return None, "setpriv, which lets root become nobody, is not installed (package util-linux)"
    known = subprocess.run([bwrap, "--help"], capture_output=True, text=True).stdout
    # RLIMIT_NPROC means nothing to root, and root in a namespace is root to the files of the host
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups --".split() if os.geteuid() == 0 else []
    small = ["--size", str(SCRATCH)] if "--size" in known else []
    box = [*nobody, bwrap, *"""--unshare-all --die-with-parent --new-session --as-pid-1 --hostname sandbox
           --uid 65534 --gid 65534 --cap-drop ALL --ro-bind /usr /usr""".split(),
           "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
           *(["--unshare-user", "--disable-userns"] if "--disable-userns" in known else [])]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            box += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            box += ["--ro-bind", name, name]
    problem = ""
    for python in dict.fromkeys((os.path.realpath(sys.executable), "/usr/bin/python3")):
        home = os.path.dirname(os.path.dirname(python))   # nobody may not be let in there; then the system's
        command = [*box, *(() if python.startswith("/usr/") else ("--ro-bind", home, home)),
                   *"--proc /proc --dev /dev".split(), *small, "--tmpfs", "/dev/shm", *small, "--tmpfs",
                   *"/tmp --remount-ro /dev --remount-ro / --chdir /tmp".split()]
        done = subprocess.run([*command, python, "-I", "-S", "-c", "print(1)"], env={}, capture_output=True,
                              text=True)
        if done.stdout == "1\n":
            return (command, python), ""
        problem = problem or done.stderr.strip()[-200:]
    return None, f"bubblewrap does not work here ({problem}); a container must allow user namespaces"


def check_sandbox(unsafe_sandbox=False):
    """Raises SandboxMissing where programs cannot be run: to be called when a job starts."""
    if not unsafe_sandbox and bubblewrap()[0] is None:
        raise SandboxMissing(f"{bubblewrap()[1]}. Install the package (apt-get install bubblewrap), or give "
                             "unsafe_sandbox=True to run programs of unknown origin with your own rights")


def _seccomp():
    """A filter, as bytes for bwrap, of the system calls REFUSED; b"" on a machine whose numbers are not
    listed. It is a classic BPF program (man 2 seccomp): lines of (operation, jump if true, jump if false,
    value)."""
    machines = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
    if platform.machine() not in machines:
        return b""
    architecture, column = machines[platform.machine()]
    calls = [numbers[column] for numbers in REFUSED.values()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000             # refuse: with EPERM
    program = [(load, 0, 0, 4),                           # the architecture: another one kills
               (equal, 1, 0, architecture),
               (answer, 0, 0, kill),
               (load, 0, 0, 0),                           # the call's number: x32's are refused
               (at_least, len(calls) + 1, 0, 0x40000000)]
    for i, number in enumerate(calls):
        program.append((equal, len(calls) - i, 0, number))
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *line) for line in program)


def _run_once(code, kind, name, stdin, seconds, memory, unsafe):
    """(exit status, stdout, stderr) of a program on one input; bytes. 124: out of time. Its outputs are files
    in memory: nothing to pump, and nothing that fills up."""
    check_sandbox(unsafe)
    if unsafe:
        warnings.warn("unsafe_sandbox: programs run with resource limits only; they can read and write your "
                      "files and use the network", stacklevel=4)
    with contextlib.ExitStack() as stack:
        files = []
        for content in (stdin, b"", b"", code, b"" if unsafe else _seccomp()):
            files.append(os.memfd_create("file"))
            stack.callback(os.close, files[-1])
            with open(files[-1], "wb", closefd=False) as file:
                file.write(content)
            os.lseek(files[-1], 0, os.SEEK_SET)
        box, python = ([], sys.executable) if unsafe else bubblewrap()[0]
        box = [*box, "--seccomp", str(files[4])] if box and _seccomp() else box
        process = subprocess.Popen(
            [*box, python, *"-I -S -B -X utf8 -c".split(), _HARNESS, kind, name, str(files[3]), str(seconds),
             str(memory + BASE), str(OUTPUT), "0" if unsafe else str(PROCESSES)],
            stdin=files[0], stdout=files[1], stderr=files[2], pass_fds=files[3:], start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"})
        try:
            pidfd = os.pidfd_open(process.pid)
            stack.callback(os.close, pidfd)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            late = not poll.poll(1000 * (2 * seconds + 3))               # the first process is stuck too
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)    # not reaped yet, so the number is still its own
            status = process.wait()
        outputs = [os.pread(fd, OUTPUT + 1, 0) for fd in files[1:3]]
    return 124 if late else 128 - status if status < 0 else status, *outputs


def run_program(*question):
    """_run_once(), again where the machine was out of namespaces."""
    for _ in range(3):
        status, out, err = _run_once(*question)
        if status != 1 or not err.startswith(b"bwrap: "):
            break
    return status, out, err
