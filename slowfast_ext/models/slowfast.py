"""The two-pathway backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import SlowFastConfig
from .resnet3d import Lateral, ResNet3dPathway


class SlowFastBackbone(nn.Module):
    """A slow pathway with few frames, a fast one with few channels, and lateral connections from fast to slow.

    Children ``slow_path`` and ``fast_path`` (:class:`ResNet3dPathway`).
    """

    def __init__(self, config: SlowFastConfig):
        super().__init__()
        self.config = config
        laterals = [
            Lateral(channels, config.fusion_kernel, config.speed_ratio, config.lateral_norm)
            for channels in config.fast.channels[:4]
        ]
        self.slow_path = ResNet3dPathway(config.slow, laterals)
        self.fast_path = ResNet3dPathway(config.fast)
        self.init_weights()

    def init_weights(self):
        for pathway in (self.slow_path, self.fast_path):
            pathway.init_weights(self.config.zero_init_residual)

    def split(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """The frames of each pathway.

        Args:
            clip (Tensor[N, C, T, H, W]): T divisible by ``resample_rate``.

        Returns:
            Tensor[N, C, T / resample_rate, H, W] and Tensor[N, C, T * speed_ratio / resample_rate, H, W].
        """
        config = self.config
        if config.frame_sampling == "strided":
            slow = clip[:, :, :: config.resample_rate]
        elif torch.compiler.is_compiling():
            slow = clip.index_select(2, self.linspace_frames(clip.shape[2], clip.device))
        else:
            # One copy of each frame, in the layout of the clip: an index tensor would have to travel to the device.
            slow = torch.cat([clip.narrow(2, index, 1) for index in config.slow_frames(clip.shape[2])], 2)
        return slow, clip[:, :, :: config.resample_rate // config.speed_ratio]

    def linspace_frames(self, frames: int | torch.SymInt, device: torch.device) -> Tensor:
        """The frames of ``frame_sampling="linspace"`` as an int64 tensor that is computed on ``device``.

        Those of ``SlowFastConfig.slow_frames``, whose list would fix the number of frames of an exported program.
        """
        count = frames // self.config.resample_rate
        return torch.arange(count, device=device) * (frames - 1) // max(count - 1, 1)

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """The last feature maps of both pathways.

        Args:
            clip (Tensor[N, 3, T, H, W]): normalised RGB, floating point; T divisible by ``resample_rate``.

        Returns:
            ``(slow, fast)``: for depth 50 and above Tensor[N, 2048, T / resample_rate, H / 32, W / 32] and
            Tensor[N, 256, T * speed_ratio / resample_rate, H / 32, W / 32], sizes rounded up.
        """
        self.check_clip(clip)
        slow, fast = self.split(clip)
        slow, fast = self.slow_path.conv1(slow), self.fast_path.conv1(fast)
        for lateral, slow_stage, fast_stage in zip(
            self.slow_path.laterals, self.slow_path.stages, self.fast_path.stages, strict=True
        ):
            slow, fast = slow_stage(lateral(slow, fast)), fast_stage(fast)
        return slow, fast

    def check_clip(self, clip: Tensor):
        """Raise TypeError or ValueError, with the reason, unless ``clip`` suits this network."""
        if not isinstance(clip, Tensor):
            raise TypeError(
                "SlowFast: clip must be one tensor (N, 3, T, H, W) from which both pathways take their frames, "
                f"got {type(clip).__name__}"
            )
        if clip.dim() != 5:
            hint = "; flatten the views into the batch: clip.flatten(0, 1)" if clip.dim() == 6 else ""
            raise ValueError(f"SlowFast: clip must be (N, 3, T, H, W), got shape {tuple(clip.shape)}{hint}")
        if clip.shape[1] != 3:
            hint = " (move the channels in front of the frames)" if 3 in (clip.shape[2], clip.shape[4]) else ""
            raise ValueError(f"SlowFast: clip must have 3 channels in dimension 1, got {clip.shape[1]}{hint}")
        frames, stride = clip.shape[2], self.config.resample_rate
        if frames == 0 or frames % stride:
            raise ValueError(f"SlowFast: frames of the clip must be a multiple of {stride} (slow stride), got {frames}")
        if 0 in clip.shape[3:]:
            raise ValueError(f"SlowFast: clip must have height and width of at least 1, got {tuple(clip.shape[3:])}")
        if not clip.is_floating_point():
            raise TypeError(f"SlowFast: clip must be normalised and floating point, got {clip.dtype}")
        device = next(self.parameters()).device
        if clip.device != device:
            raise ValueError(f"SlowFast: clip must be on the network's device {device}, got {clip.device}")
