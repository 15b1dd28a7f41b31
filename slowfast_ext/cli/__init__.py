"""The command line: ``slowfast-ext COMMAND``, or ``python -m slowfast_ext COMMAND``."""

import argparse
import os
import sys
from collections.abc import Sequence

from ..training.config_file import nearest
from . import bench, check_videos, convert, export, features, predict, predict_archive, report, test, train, zoo
from .mmaction2_options import add_local_rank, adopt_local_rank


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 if a part of the work failed; 2 if an argument or a file it names is wrong (one line on
        stderr says how); 130 if interrupted.
    """
    parser = _Parser(prog="slowfast-ext", description="SlowFast video recognition.")
    add_local_rank(parser)  # torch.distributed.launch puts it in front of the command
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (train, test, report, predict, features, predict_archive, export, bench, check_videos, convert, zoo):
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        adopt_local_rank(args)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of the output has left, as `head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"slowfast-ext {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"slowfast-ext {args.command}: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Names the nearest option to one that it does not know. The parsers of the commands are of this class, too."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            hint = nearest(unknown[0].partition("=")[0], options)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown
