"""The command line: each verb is a public function, its flags are the function's parameters.

Exit codes: 0 done, 1 a stage failed while running, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sidestream.errors import InputError, SidestreamError, WriteError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``sidestream`` command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["doctor"]:  # must come before everything that a broken installation cannot import
        return _doctor(argv[1:])
    import tyro

    from sidestream.cli.bench import bench
    from sidestream.cli.chart import chart
    from sidestream.cli.compare import compare
    from sidestream.cli.demo import demo
    from sidestream.cli.doctor import doctor
    from sidestream.cli.evaluate import evaluate
    from sidestream.cli.models import models
    from sidestream.cli.predict import predict
    from sidestream.cli.run import run
    from sidestream.cli.train import train

    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    verbs: dict[str, Callable[..., Any]] = {
        "run": run,
        "predict": predict,
        "train": train,
        "evaluate": evaluate,
        "bench": bench,
        "compare": compare,
        "chart": chart,
        "models": models,
        "demo": demo,
        "doctor": doctor,
    }
    try:
        return tyro.extras.subcommand_cli_from_dict(
            verbs,
            prog="sidestream",
            description="Deep video models on streams: stages in parallel, each on a different frame.",
            args=argv,
        )
    except (InputError, WriteError) as error:
        return _fail(error, 2)
    except SidestreamError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("sidestream: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        return 0
    except OSError as error:  # a full disk, a device that went away
        return _fail(error, 1)


def _doctor(argv: Sequence[str]) -> int:
    from sidestream.cli.doctor import doctor

    if unknown := [a for a in argv if a != "--json"]:
        if unknown not in (["-h"], ["--help"]):
            return _fail(InputError(f"doctor knows no {' '.join(unknown)}; it takes --json only"), 2)
        print("usage: sidestream doctor [--json]\n\nSay what is installed, what works, and how to mend what does not.")
        return 0
    return doctor(json="--json" in argv)


def _fail(error: Exception, code: int) -> int:
    print(f"sidestream: {' '.join(str(error).split())}", file=sys.stderr)
    return code
