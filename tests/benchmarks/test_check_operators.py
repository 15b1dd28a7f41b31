"""The calls that the sanitizers run: every operator is among them, right results pass and wrong ones do not."""

import check_operators
import pytest
import torch

import slowfast_ext
from slowfast_ext import ops
from slowfast_ext.ops.fast_bottleneck import SHARED_BYTES

NOT_OPERATORS = {"fold_batch_norm"}  # plain PyTorch, on weights
OPERATORS = {
    name for name in ops.__all__ if not name.endswith(("_reference", "_reason_against")) and name not in NOT_OPERATORS
}


def rows(capsys):
    """Name, type and verdict of the printed cases."""
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()[2:]]
    return [(name, dtype, verdict) for name, dtype, _, _, verdict in lines]


def test_every_operator_has_a_case():
    assert {case.operator for case in check_operators.CASES.values()} == OPERATORS


def test_every_kernel_of_the_fast_bottleneck_has_a_case():
    cases = check_operators.CASES.values()
    found = {
        (case.tensors["x"][1], case.tensors["weight_a"][0], case.keywords["stride"])
        for case in cases
        if case.operator == "fast_bottleneck"
    }
    assert found == set(SHARED_BYTES)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_all_cases_pass(device, capsys):
    assert check_operators.main(["--device", device]) == 0
    found = rows(capsys)
    assert {verdict for _, _, verdict in found} == {"correct"}
    assert {(name, dtype) for name, dtype, _ in found} == {
        (name, dtype) for name, case in check_operators.CASES.items() for dtype in case.dtypes
    }


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_a_wrong_operator_is_found_in_every_case_of_it(operator, monkeypatch, capsys):
    original = getattr(ops, operator)

    def wrong(*arguments, **keywords):
        result = original(*arguments, **keywords)
        last = result[-1] if isinstance(result, tuple) else result
        last[(-1,) * last.dim()] += 0.25 * last.abs().max()
        return result

    monkeypatch.setattr(ops, operator, wrong)
    assert check_operators.main(["--device", "cpu", "--dtype", "bfloat16"]) == 1
    for name, _, verdict in rows(capsys):
        assert verdict == ("wrong" if check_operators.CASES[name].operator == operator else "correct"), name


@pytest.mark.parametrize("operator", ["conv3d_bn_relu", "lateral_fuse_into"])
def test_writing_beside_out_is_found(operator, monkeypatch):
    original = getattr(ops, operator)

    def wide(*arguments, out=None, **keywords):
        if out is None:
            return original(*arguments, **keywords)
        original(*arguments, out=out, **keywords)
        beside = out.as_strided(out.shape, out.stride(), out.storage_offset() - 1)
        beside[:, 0] = 1
        return out

    monkeypatch.setattr(ops, operator, wide)
    assert check_operators.main(["--device", "cpu", f"{operator}*"]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_wrong(value, monkeypatch, capsys):
    original = ops.pool_head
    monkeypatch.setattr(ops, "pool_head", lambda *a, **k: original(*a, **k).fill_(value))
    assert check_operators.main(["--device", "cpu", "pool_head"]) == 1
    assert {verdict for *_, verdict in rows(capsys)} == {"wrong"}


def test_a_case_that_fails_does_not_hide_the_next(monkeypatch, capsys):
    def fail(*arguments, **keywords):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ops, "lateral_fuse", fail)
    assert check_operators.main(["--device", "cpu", "--dtype", "float32", "lateral_fuse", "stem_slow"]) == 1
    assert rows(capsys) == [
        ("lateral_fuse", "float32", "failed: RuntimeError: an illegal memory access was encountered"),
        ("stem_slow", "float32", "correct"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype must be of float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["unknown*"], "CASE must match one of batch_norm_statistics"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        check_operators.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_without_kernels_a_gpu_is_refused(monkeypatch, capsys):
    """There the operators are their references, which would agree with themselves."""
    monkeypatch.setattr(check_operators, "check_device", torch.device)
    monkeypatch.setattr(slowfast_ext, "unavailable_reason", lambda device: "they were not built")
    with pytest.raises(SystemExit) as exit_:
        check_operators.main(["--device", "cuda"])
    assert exit_.value.code == 2
    assert "got cuda: they were not built" in capsys.readouterr().err
