"""A whole network in OpenVINO, where it is installed: a candidate beside oneDNN on a CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import warnings

import torch
from torch import Tensor, nn

from .autotune import Candidate, Tuner
from .ceilings import measure_ceilings
from .cpu import CpuBackend
from .network import Network
from .plan import Plan, Signature, draw_steps
from .program import Program, normalisation_vectors

logger = logging.getLogger(__name__)

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Largest ||OpenVINO - oneDNN|| / ||oneDNN|| of the logits: each is off by up to 2e-6 and 3e-2 in R50.
_NETWORK_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 8e-2}


class OpenVinoBackend:
    """Makes programs of OpenVINO's CPU plugin.

    Args:
        network: what ``model`` is.
        model: in evaluation mode; converted at once, not kept.

    Raises:
        Exception: whatever OpenVINO raises where it cannot convert the model.
    """

    def __init__(self, network: Network, model: nn.Module):
        import openvino

        self.network = network
        config = network.config
        # Of the least size that the head takes: the sizes are set anew for each program, and tracing runs the network.
        size = 32 * (1 if config.head_pooling == "global" else max(config.head_window))
        example = torch.zeros(1, 3, config.clip_len, size, size)
        plain = model if model.cls_head.fc_cls.weight.dtype == torch.float32 else _copy_in_float32(model)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # of the tracer, about the checks of shapes
            traced = torch.jit.trace(_LogitsAndFeatures(plain).eval(), example, check_trace=False)
            self._model = openvino.convert_model(traced, example_input=example)
        self._core = openvino.Core()
        self.version = openvino.get_version()

    def reason_against(self, signature: Signature) -> str | None:
        """Why there can be no program for the signature, or None."""
        frames = self.network.config.clip_len
        if signature.clip[1] != frames:
            return f"OpenVINO has the network for clips of {frames} frames"
        return None

    def program(self, signature: Signature) -> Program:
        n, frames, height, width = signature.clip
        model = self._model.clone()
        model.reshape([n, 3, frames, height, width])
        options = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.network.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return OpenVinoProgram(self.network, signature, self._core.compile_model(model, "CPU", options))


class FasterCpuBackend:
    """Makes programs of oneDNN, or of OpenVINO where that is installed and was measured to be faster.

    Args:
        onednn: the backend without OpenVINO.
        tuner: without tuning nothing is measured, and OpenVINO is left alone.
        model: what the network was read from; not kept.
    """

    def __init__(self, onednn: CpuBackend, tuner: Tuner, model: nn.Module):
        self.network, self._onednn, self._tuner = onednn.network, onednn, tuner
        self._openvino: OpenVinoBackend | None = None
        self._note = ""
        if tuner.enabled and importlib.util.find_spec("openvino") is not None:
            try:
                self._openvino = OpenVinoBackend(self.network, model)
            except Exception as error:  # a converter fails in many ways; oneDNN is there
                self._note = f"OpenVINO does not convert the network: {type(error).__name__}: {error}"
                logger.warning("InferenceEngine: %s", self._note)

    @property
    def name(self) -> str:
        return "oneDNN" if self._openvino is None else "oneDNN or OpenVINO"

    def program(self, signature: Signature) -> Program:
        program = self._onednn.program(signature)
        if self._openvino is None:
            program.notes += (self._note,) if self._note else ()
            return program
        reason = self._openvino.reason_against(signature)
        if reason is not None:
            program.notes += (reason,)
            return program
        programs = {"oneDNN": program, "OpenVINO": self._openvino.program(signature)}
        n, *shape = signature.shape
        clip = torch.randint(256, (n, *shape), dtype=torch.uint8) if signature.raw else torch.randn(n, *shape)
        name, why = self._tuner.choose(
            f"network {self._digest()} {signature.shape} {signature.output} {self.network.dtype}, "
            f"OpenVINO {self._openvino.version}",
            [Candidate(name, lambda run=run: run(clip)) for name, run in programs.items()],
            lambda: program(clip),
            _NETWORK_LIMIT[self.network.dtype],
        )
        programs[name].notes += (f"{name} {why}",)
        return programs[name]

    def _digest(self) -> str:
        return hashlib.sha256(repr(self.network.config).encode()).hexdigest()[:12]


class _LogitsAndFeatures(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.model.backbone(clip)
        return self.model.cls_head(maps), torch.cat([features.mean((2, 3, 4)) for features in maps], 1)


def _copy_in_float32(model: nn.Module) -> nn.Module:
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


class OpenVinoProgram(Program):
    """One compiled model; ``compiled`` is OpenVINO's."""

    def __init__(self, network: Network, signature: Signature, compiled):
        self.signature, self._network = signature, network
        self.steps, self.notes = draw_steps(network, signature, CpuBackend.fusion)
        for step in self.steps:
            step.kernel, step.why = "OpenVINO", "part of one compiled model"
        self._normalisation = normalisation_vectors(network)
        self._request = compiled.create_infer_request()

    def __call__(self, clip: Tensor) -> Tensor:
        if self.signature.raw:
            scale, shift = (vector.view(3, 1, 1, 1) for vector in self._normalisation)
            clip = torch.addcmul(shift, clip.permute(0, 4, 1, 2, 3).float(), scale)
        clip = clip.float().contiguous()
        outputs = self._request.infer([clip.detach().numpy()])
        result = torch.from_numpy(outputs[0 if self.signature.output == "logits" else 1].copy())
        return result + (clip.sum((1, 2, 3, 4)) * 0)[:, None]  # its ReLU, as oneDNN's, makes 0 of NaN

    def plan(self) -> Plan:
        title = f"OpenVINO on {self._network.device}, {self._network.dtype}, clip {self.signature.shape}"
        ceilings = measure_ceilings(self._network.device, self._network.dtype)
        return Plan(title, self.steps, {}, 0, ceilings, self.notes)
