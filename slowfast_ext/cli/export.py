"""``slowfast-ext export MODEL OUT.onnx``."""

import argparse
import os
import sys

from ..evaluation.extras import require_packages
from ..evaluation.onnx_export import OUTPUTS, export_onnx
from .arguments import add_model_argument, find_network
from .files import check_writable, positive

_DESCRIPTION = """\
Write a network as one ONNX file and check it: ONNX Runtime must give what PyTorch gives, at two batch sizes.
The input "clip" is float32 (batch, 3, T, H, W) with any batch: RGB, normalised with the mean and the standard deviation
that are printed (on the 0 to 255 scale) and stored, as part of the network's configuration, in the file's metadata.
"""
_EPILOG = """\
examples:
  slowfast-ext export slowfast_r50_8x8.pyth slowfast.onnx
  slowfast-ext export slowfast_r50_8x8x1_256e_kinetics400_rgb slowfast.onnx --checkpoint weights.pth

Exit status: 0; 1 if the export fails or the file does not compute what PyTorch does, nothing is written then; 2 if the
arguments are wrong.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a network as ONNX",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser)
    parser.add_argument("output_file", metavar="OUT", help="file to write, .onnx")
    parser.add_argument("--output", default="logits", choices=OUTPUTS, help="what the file computes (default: logits)")
    parser.add_argument("--frames", type=positive, metavar="T", help="of the clip, instead of the network's test clip")
    parser.add_argument("--height", type=positive, metavar="H", help="of the clip, instead of the network's test crop")
    parser.add_argument("--width", type=positive, metavar="W", help="of the clip, instead of the network's test crop")
    parser.add_argument(
        "--opset", type=positive, metavar="N", help="version of the operators (default: the exporter's)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_packages("export", ("onnx", "onnxscript", "onnxruntime"), "onnx")
    if not args.output_file.endswith(".onnx"):
        raise ValueError(f"OUT must end in .onnx, got '{args.output_file}'")
    check_writable("OUT", args.output_file)
    model = find_network(args)
    try:
        report = export_onnx(
            model,
            args.output_file,
            frames=args.frames,
            height=args.height,
            width=args.width,
            output=args.output,
            opset=args.opset,
        )
    except RuntimeError as error:  # the exporter fails, or the file computes something else
        print(f"slowfast-ext export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    shape = ", ".join(map(str, report.clip_shape))
    errors = ", ".join(f"{error:.1e} (batch {batch})" for batch, error in report.errors.items())
    normalization = model.config.normalization
    print(f"clip: float32 (batch, {shape}), normalised with mean {normalization.mean}, std {normalization.std}")
    print(f"{report.output}: float32 (batch, {model.config.num_classes})")
    print(f"relative error of ONNX Runtime against PyTorch: {errors}")
    size = os.path.getsize(report.path) / 1e6
    print(f"written: {report.path} ({size:.1f} MB, opset {report.opset})")
    return 0
