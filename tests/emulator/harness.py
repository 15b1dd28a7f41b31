"""How the tests of every kernel run it: plainly in this process; sanitized, and as mutants, in processes of their own.

A module of cases, ``<op>_cases.py``, has ``CASES`` and is a script: ``python <op>_cases.py LIBRARY [SUBSTRING]``, see
:func:`main`. It and this module need NumPy only, so that they run under a sanitizer.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType

import toolchain

SANITIZERS = ("address", "thread")
# What shows that a run failed for the reason it was made for. UndefinedBehaviorSanitizer, which is part of the way
# "address", reports runtime errors.
REPORTS = {
    "address": r"ERROR: AddressSanitizer|runtime error: ",
    "thread": r"WARNING: ThreadSanitizer: data race",
    "conflicts": r"[1-9]\d* bank conflicts",
}


@dataclass(frozen=True)
class Mutant:
    """A mistake in a kernel, and how it shows.

    Attributes:
        old (str): text that occurs once in one of the kernel's files.
        new (str): what replaces it.
        way (str): how it is run: "plain", "random" (order of threads), "conflicts" (of banks), or a sanitizer.
        cases (str): on the cases whose names contain this.
    """

    old: str
    new: str
    way: str
    cases: str


@dataclass(frozen=True)
class Kernel:
    """A kernel under test.

    Attributes:
        operator (str): its name.
        cases (ModuleType): the module of its cases.
        mutants (dict[str, Mutant]): by a name that says what is wrong.
        files (tuple[str, ...]): of csrc that mutants change; by default the operator's .cuh.
        reduced (dict): replacements (of :func:`toolchain.mutated`) that leave out what no mutant is run on.
    """

    operator: str
    cases: ModuleType
    mutants: dict[str, Mutant]
    files: tuple[str, ...] = ()
    reduced: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def build(self, name):
        """Build "plain", a sanitizer, or a mutant; all but the first for bfloat16 only."""
        if name == "plain":
            return toolchain.build(self.operator)
        options = {"sanitizer": name if name in SANITIZERS else None, "defines": ("ONLY_BFLOAT16",)}
        if name in SANITIZERS:
            return toolchain.build(self.operator, **options)
        mutant = self.mutants[name]
        options["sanitizer"] = mutant.way if mutant.way in SANITIZERS else None
        files = self.files or (f"{self.operator}.cuh",)
        changes = {
            file: [(mutant.old, mutant.new)] for file in files if mutant.old in (toolchain.CSRC / file).read_text()
        }
        if len(changes) != 1:
            raise ValueError(f"{name}: {mutant.old!r} must occur in one of {', '.join(files)}, got {len(changes)}")
        with toolchain.mutated(self.reduced | changes) as csrc:
            return toolchain.build(self.operator, csrc=csrc, **options)


class Builds:
    """Modules of a kernel, compiled side by side in advance."""

    def __init__(self, kernel, names):
        self.kernel = kernel
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.futures = {name: self.pool.submit(kernel.build, name) for name in names}

    def close(self):
        self.pool.shutdown(cancel_futures=True)

    def __getitem__(self, name):
        return self.futures[name].result()

    def run(self, name, way, cases=""):
        """Run the bfloat16 cases whose names contain ``cases`` in a process of their own."""
        environment = {"SLOWFAST_EXT_EMULATOR_SEED": "7"} if way == "random" else {}
        sanitizer = way if way in SANITIZERS else None
        script = self.kernel.cases.__file__
        return toolchain.run_sanitized(sanitizer, script, self[name], cases, environment=environment)

    def check_sanitizer_finds_nothing(self, sanitizer):
        result = self.run(sanitizer, sanitizer)
        assert result.returncode == 0, result.stdout + result.stderr[-4000:]
        assert result.stdout.count("\n") == len(self.kernel.cases.CASES)

    def check_mutant_is_seen(self, name):
        """Seen for what it is, not because the process broke down on the way."""
        mutant = self.kernel.mutants[name]
        result = self.run(name, mutant.way, mutant.cases)
        output = result.stdout + result.stderr
        assert result.returncode != 0, output
        if mutant.way in REPORTS:
            assert re.search(REPORTS[mutant.way], output), output
        else:
            assert re.search("^FAILED ", result.stdout, re.MULTILINE) or "emulator: " in result.stderr, output


def main(run, cases, library, substring=""):
    """Run the cases whose names contain ``substring``, print how each ended.

    Args:
        run (Callable): of the module of the kernel and a case; the error in units of its bound.
        cases (dict): by name.
        library (str): that :func:`toolchain.build` made.
        substring (str): of names.

    Returns:
        int: exit status, 1 if an error is larger than its bound, or if banks met twice, or if there is no such case.
    """
    module = toolchain.load(library)
    failures, names = 0, [name for name in cases if substring in name]
    for name in names:
        error = run(module, cases[name])
        _, bank_conflicts = module.statistics()
        failed = not error <= 1 or bank_conflicts > 0
        verdict = "FAILED" if failed else "passed"
        print(f"{verdict} {name}: error {error:.3f} of the bound, {bank_conflicts} bank conflicts")
        failures += failed
    return 0 if names and not failures else 1
