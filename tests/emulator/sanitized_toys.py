"""Run one toy kernel under a sanitizer: sanitized_toys.py SANITIZER CASE. Started by test_emulator.py."""

import sys

import build
import numpy as np

sanitizer, case = sys.argv[1:]
toys = build.load("toys", [build.EMULATOR / "toy_kernels.cpp"], sanitizer=sanitizer)
if case.startswith("matmul:"):
    ones = np.full((100, 96), 0x3F80, np.uint16)  # in bfloat16
    toys.matmul_bfloat16(ones, ones[:64], getattr(toys.Mistake, case[7:]))
elif case.startswith("shift:"):
    threads, barrier = case[6:].split(",")
    toys.shift(np.zeros(int(threads), np.float32), barrier == "True")
else:
    toys.run(case)
