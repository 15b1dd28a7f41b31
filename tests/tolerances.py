"""One table of tolerances for every comparison of a fused with a plain computation."""

import math

import torch

# Unit roundoff u: half the distance from 1 to the next number. TF32 keeps 10 bits of each factor's significand.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    "tf32": 2.0**-11,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# A sum of n random terms strays from its expectation by sqrt(n) standard deviations; the largest of the some 10^5
# outputs of a test lies 4.5 of them out, the rest is margin.
DEVIATIONS = 8


def tolerance(
    dtype: torch.dtype | str, terms: int, *, roundings: int = 1, scale: float | None = None
) -> dict[str, float]:
    """``rtol`` and ``atol`` for sums of ``terms`` products, for :func:`torch.testing.assert_close`.

    Three sources, for results of standard deviation ``scale``, with u the roundoff of ``dtype`` and v that of the
    accumulator (float32 for dtypes of 16 bits and TF32, else ``dtype``):

    - Accumulation. Partial sum i of n has deviation ``scale * sqrt(i / n)`` and is rounded by at most v times that; the
      errors are independent, so their sum has deviation below ``v * scale * sqrt(sum(i / n))``, about
      ``v * scale * sqrt(n / 2)``.
    - Factors. Each product of factors that were rounded differently (folded weights, TF32) is off by u relative; the n
      products have deviation ``scale / sqrt(n)``, hence their sum ``u * scale``, once for each of ``roundings`` - 1.
    - Stored values. Every tensor written in ``dtype`` is off by u relative: the result (``rtol``), and each
      intermediate that enters it, as above.

    Args:
        dtype: of the computation, "tf32" for float32 with TF32 products.
        terms: products in one output: kernel elements times input channels, summed over the layers passed.
        roundings: how often either computation rounds to ``dtype``: 1 for one convolution of given operands; each
            further rounding of a weight or an intermediate tensor counts.
        scale: standard deviation of the result; by default ``sqrt(terms)``, that of factors of deviation 1.
    """
    scale = math.sqrt(terms) if scale is None else scale
    u = UNIT_ROUNDOFF[dtype]
    v = u if dtype == torch.float64 else UNIT_ROUNDOFF[torch.float32]
    stored = UNIT_ROUNDOFF[torch.float32] if dtype == "tf32" else u
    factors = u if dtype == "tf32" else 0.0
    atol = DEVIATIONS * scale * (v * math.sqrt(terms / 2) + u * math.sqrt(roundings - 1) + factors)
    return {"rtol": 2 * stored, "atol": atol}


def variance_tolerance(dtype: torch.dtype, terms: int, mean: float) -> dict[str, float]:
    """``rtol`` and ``atol`` for the variance of ``terms`` values of deviation 1 around ``mean``, given exactly.

    Of a sum of squared deviations from a running mean each update is off by the roundoff of the accumulator times the
    condition number ``sqrt(1 + mean^2)`` (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance",
    1983). The errors are independent. Without a running mean it would be the square of that number.
    """
    v = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    return {"rtol": DEVIATIONS * v * math.sqrt(terms * (1 + mean**2)), "atol": 0.0}
