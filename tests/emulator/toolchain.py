"""Compile kernels against the emulator with g++: Python modules, sanitized ones too, and mutants of the sources.

``<op>.cpp`` includes the kernel of csrc/ and lists what Python may call; ``binding.cpp``, compiled once, is linked to
it. Objects and modules are kept in the cache folder of pytest (``--cache-clear`` empties it).
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / ".pytest_cache" / "d" / "emulator"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-g1", "-Wall", "-Wno-unknown-pragmas"]
SANITIZERS = {
    None: ["-O3"],
    # And what a GPU traps or leaves undefined but plain g++ lets pass: misaligned vector accesses, wild shifts.
    "address": [
        "-O1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow",
        "-fno-sanitize-recover=all",
    ],
    "thread": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
# Compiled as for ThreadSanitizer, but linked to traffic.cpp in its place.
TRAFFIC = ["-O0", "-fsanitize=thread", "-DEMULATOR_TRAFFIC"]


def compiler():
    """Path of g++ (or of ``$CXX``), None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def unavailable_reason():
    """Why nothing can be built here, or None."""
    if compiler() is None:
        return "the kernel emulator needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the kernel emulator needs pybind11"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "the kernel emulator needs the headers of Python"
    return None


@functools.cache
def compiler_version():
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def make(output, flags, inputs, headers=(), includes=()):
    """Run the compiler on ``inputs``, or find what it made of equal ones in the cache.

    Args:
        output (str): name of the file that is made, to which a digest of all it depends on is added.
        flags (list[str]): of the compiler.
        inputs (list[Path]): sources or objects.
        headers (Iterable[Path]): what the inputs include, of this project.
        includes (list[Path]): folders to find headers in.

    Returns:
        Path: the file.

    Raises:
        RuntimeError: the compiler's messages.
    """
    digest = hashlib.sha256(repr((compiler_version(), flags, sysconfig.get_config_var("SOABI"))).encode())
    for path in [*inputs, *sorted(headers)]:
        digest.update(path.name.encode() + path.read_bytes())
    stem, suffix = output.split(".")
    result = CACHE / f"{stem}-{digest.hexdigest()[:16]}.{suffix}"
    if not result.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = result.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        command = [compiler(), *flags, *(f"-I{folder}" for folder in includes), *map(str, inputs), "-o", str(partial)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{process.stderr}")
        partial.rename(result)
    return result


def python_includes():
    import pybind11

    return [Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]


def headers_of(*folders):
    return [path for folder in folders for path in folder.rglob("*.*h")]


_shared_object_lock = threading.Lock()


def shared_object(name, *flags):
    """The object of ``name``.cpp, which is linked to many kernels."""
    with _shared_object_lock:
        includes = [EMULATOR, *python_includes()]
        return make(f"{name}.o", [*FLAGS, *flags, "-c"], [EMULATOR / f"{name}.cpp"], headers_of(EMULATOR), includes)


def build(name, *, sanitizer=None, traffic=False, defines=(), csrc=CSRC):
    """Build the module of ``name``.cpp, or find it in the cache.

    Args:
        name (str): of an operator, or "toy_kernels".
        sanitizer (str | None): one of SANITIZERS.
        traffic (bool): count what each access to memory costs, see traffic.h; without a sanitizer.
        defines (Iterable[str]): macros, ``NAME`` or ``NAME=VALUE``.
        csrc (Path): kernels, perhaps a mutant.

    Returns:
        Path: the shared library, for :func:`load`.

    Raises:
        RuntimeError: the compiler's messages.
    """
    source = EMULATOR / f"{name}.cpp"
    binds_itself = "PYBIND11_MODULE" in source.read_text()
    sanitizers = SANITIZERS[sanitizer]
    flags = [*FLAGS, *(TRAFFIC if traffic else sanitizers), "-DSLOWFAST_EXT_EMULATOR"]
    flags += [f"-D{define}" for define in defines]
    includes = [csrc, EMULATOR, *(python_includes() if binds_itself else [])]
    kernel = make(f"{name}.o", [*flags, "-c"], [source], headers_of(csrc, EMULATOR), includes)
    objects = [kernel]
    if not binds_itself:
        objects.append(shared_object("binding", "-O1"))
    if traffic:
        objects.append(shared_object("traffic", "-O2", "-DSLOWFAST_EXT_EMULATOR", "-DEMULATOR_TRAFFIC"))
    return make(f"{name}.so", [*FLAGS, *([] if traffic else sanitizers), "-shared"], objects)


def load(library):
    """Import what :func:`build` made; a sanitized one only in a process of :func:`run_sanitized`."""
    # Python looks for what initialises `kernel`; pybind11 takes modules of one full name for the same.
    spec = importlib.util.spec_from_file_location(f"{Path(library).stem}.kernel", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sanitized(sanitizer, script, *arguments, environment=()):
    """Run ``script``, a Python file that loads a module built with ``sanitizer``, in a process prepared for it.

    Returns:
        subprocess.CompletedProcess: output as text; stderr holds the sanitizer's reports and the exit status is not
        zero if there are any.
    """
    runtimes = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}.get(sanitizer, [])
    # libstdc++ too: AddressSanitizer must find __cxa_throw when it starts.
    paths = [
        subprocess.run([compiler(), f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout
        for library in runtimes
    ]
    settings = {
        "LD_PRELOAD": ":".join(path.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66",
        **dict(environment),
    }
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=600)


@contextlib.contextmanager
def mutated(replacements, csrc=CSRC):
    """A copy of ``csrc`` with changed text, to show that the tests see the change.

    Args:
        replacements (dict[str, list[tuple[str, str]]]): for a file of csrc, pairs (old, new); each old text must occur
            exactly once.

    Yields:
        Path: the copy, in a temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="slowfast_ext_mutant_") as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(csrc, copy)
        for file, pairs in replacements.items():
            text = (copy / file).read_text()
            for old, new in pairs:
                if text.count(old) != 1:
                    raise ValueError(f"mutated: {old!r} must occur once in {file}, got {text.count(old)}")
                text = text.replace(old, new)
            (copy / file).write_text(text)
        yield copy
