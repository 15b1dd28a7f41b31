"""Run one toy kernel under a sanitizer: sanitized_toys.py SANITIZER CASE. Started by test_emulator.py."""

import sys

import numpy as np
import toolchain

sanitizer, case = sys.argv[1:]
toys = toolchain.load(toolchain.build("toy_kernels", sanitizer=sanitizer))
if case.startswith("matmul:"):
    ones = np.full((100, 96), 0x3F80, np.uint16)  # in bfloat16
    toys.matmul_bfloat16(ones, ones[:64], getattr(toys.Mistake, case[7:]))
elif case.startswith("shift:"):
    threads, barrier = case[6:].split(",")
    toys.shift(np.zeros(int(threads), np.float32), barrier == "True")
else:
    toys.run(case)
