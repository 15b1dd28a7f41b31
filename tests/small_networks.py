"""Networks with the zoo's structure and few channels, for tests that compute."""

import dataclasses
import json

import torch
from torch import nn

from slowfast_ext.checkpoints.settings import CONFIG_ENTRY
from slowfast_ext.models import SlowFastConfig, build_model, fast_pathway, slow_pathway


def small_config(slow_depth=50, fast_depth=50, **fields) -> SlowFastConfig:
    """8x8 with an eighth of the slow and a quarter of the fast channels, 5 classes; ``fields`` override."""
    slow = dataclasses.replace(slow_pathway(slow_depth), base_channels=8)
    fast = dataclasses.replace(fast_pathway(fast_depth), base_channels=2)
    defaults = {"resample_rate": 4, "speed_ratio": 4, "fusion_kernel": 7, "num_classes": 5}
    return SlowFastConfig(**{"slow": slow, "fast": fast, **defaults, **fields})


def lively_model(config: SlowFastConfig) -> nn.Module:
    """A network in eval mode in which every weight and statistic matters to the result."""
    model = build_model(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "bn." in name and not name.endswith("num_batches_tracked"):
                value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.2)
        model.head.fc_cls.weight.normal_(0, 0.2)
        model.head.fc_cls.bias.normal_()
    return model


def lively_checkpoint(folder, config: SlowFastConfig) -> tuple[nn.Module, str]:
    """A lively network and the file of its weights, with its configuration, in ``folder``."""
    model = lively_model(config)
    path = folder / "small.pth"
    torch.save({"meta": {CONFIG_ENTRY: json.dumps(config.to_dict())}, "state_dict": model.state_dict()}, path)
    return model, str(path)
