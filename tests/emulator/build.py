"""Compile kernels against the emulator with g++: pybind11 modules, sanitized ones too, and mutants of the sources.

A binding is a .cpp file that includes a kernel of csrc/ and exposes it, NumPy in and NumPy out, with
``PYBIND11_MODULE(MODULE_NAME, module)``. Builds are kept in the cache folder of pytest (``--cache-clear`` empties it).
"""

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
FLAGS = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-g1", "-Wall", "-Wno-unknown-pragmas"]
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


def build(name, sources, *, sanitizer=None, defines=(), csrc=CSRC):
    """Build the module ``name`` from C++ ``sources``, or find it in the cache.

    Args:
        name (str): of the module; MODULE_NAME in the sources.
        sources (list[Path]): bindings.
        sanitizer (str | None): one of SANITIZERS.
        defines (Iterable[str]): macros, ``NAME`` or ``NAME=VALUE``.
        csrc (Path): kernels, perhaps a mutant.

    Returns:
        Path: the shared library.

    Raises:
        RuntimeError: the compiler's messages.
    """
    import pybind11

    includes = [csrc, EMULATOR, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [compiler(), *FLAGS, *SANITIZERS[sanitizer], f"-DMODULE_NAME={name}", "-DSLOWFAST_EXT_EMULATOR"]
    command += [f"-D{define}" for define in defines]
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((version, command, sysconfig.get_config_var("SOABI"))).encode())
    headers = [path for folder in (csrc, EMULATOR) for path in folder.rglob("*.*h")]
    for path in [*sources, *sorted(headers)]:
        digest.update(path.name.encode() + path.read_bytes())
    library = CACHE / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        command += [*(f"-I{folder}" for folder in includes), *map(str, sources), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")
        partial.rename(library)
    return library


def load(name, sources, **options):
    """Build a module (arguments as for build) and import it; a sanitized one only in a process of run_sanitized."""
    library = build(name, sources, **options)
    spec = importlib.util.spec_from_file_location(name, library)
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


def mutate(replacements, csrc=CSRC):
    """A copy of ``csrc`` with changed text, to show that the tests see the change.

    Args:
        replacements (dict[str, list[tuple[str, str]]]): for a file of csrc, pairs (old, new); each old text must occur
            exactly once.

    Returns:
        Path: the copy, in a new temporary folder.
    """
    copy = Path(tempfile.mkdtemp(prefix="slowfast_ext_mutant_")) / "csrc"
    shutil.copytree(csrc, copy)
    for file, pairs in replacements.items():
        text = (copy / file).read_text()
        for old, new in pairs:
            if text.count(old) != 1:
                raise ValueError(f"mutate: {old!r} must occur once in {file}, got {text.count(old)}")
            text = text.replace(old, new)
        (copy / file).write_text(text)
    return copy
