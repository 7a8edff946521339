"""Lend this machine's devices to another one, for models larger than that holds: `--worker HOST:PORT` there.

One client is served at a time. Weights that were sent once are kept on the disk, so that they need not be sent again.
Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from models.errors import HandmillError, LoadError, UsageError
from models.text import printable
from runner.cli.options import cache_size, integer, size

HELP = "lend this machine's devices to another over the network"
ORDER = 90
_CACHE = 16 << 30
_MOST_ENDS, _WITHIN = 5, 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1", help="where clients come (127.0.0.1:50052)"
    )
    parser.add_argument("--device", metavar="D", help="what to lend, as `handmill doctor` names it (the GPUs)")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="lend so much of each device at most, such as 6G")
    parser.add_argument("--cache", type=cache_size, metavar="SIZE|off", help="disk for weights sent before (16G)")
    parser.add_argument("-j", "--threads", type=integer(1), metavar="N", help="threads that a CPU computes with")
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine, without authentication")


def run(args: argparse.Namespace) -> int:
    from models.isolated import Ended, isolation
    from models.library import home
    from runner.engine.threads import default_threads
    from runner.worker import Lent, serve

    host, port = _address(args.listen, insecure=args.insecure)
    cache_bytes = _CACHE if args.cache is None else args.cache
    lent = Lent(
        host,
        port,
        args.device,
        args.memory,
        args.threads or default_threads(),
        home() / "worker" if cache_bytes else None,
        cache_bytes,
    )
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # those of threads take addresses, and --memory counts these
    ends: list[float] = []
    while True:
        try:
            with isolation("runner.worker") as apart:
                apart.call(serve, lent, seconds=float("inf"), heard=_say)
        except Ended as end:
            ends = [moment for moment in ends if time.monotonic() - moment < _WITHIN] + [time.monotonic()]
            if len(ends) >= _MOST_ENDS:
                raise LoadError(f"the server ends again and again: {end}") from None
            _say(f"the server ended: {end}; it is started again")


def _say(line: object) -> None:
    print(printable(line, 1000), file=sys.stderr, flush=True)


def _address(listen: str, *, insecure: bool) -> tuple[str, int]:
    """An IPv4 address and a port that is free, if any was asked for. Raises UsageError."""
    import ipaddress
    import socket

    from runner.rpc import DEFAULT_PORT, parse_endpoint

    try:
        name, port = parse_endpoint(listen, DEFAULT_PORT)
        host = socket.gethostbyname(name)
    except HandmillError as error:
        raise UsageError(f"--listen: {error}", hint=error.hint) from error
    except OSError as error:
        raise UsageError(f"--listen: {printable(name)} is no address of this machine: {error}") from error
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    if not ipaddress.ip_address(host).is_loopback:
        tunnel = f"ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}"
        told = "llama.cpp's protocol has no authentication: whoever reaches it can run what they like on this machine"
        way = f"Listen at 127.0.0.1:{port}, and on the other machine run `{tunnel}` and use --worker 127.0.0.1:{port}"
        if not insecure:
            raise UsageError(f"{host} can be reached from other machines, and {told}", hint=f"{way}; or --insecure.")
        _say(f"warning: {told}.")
        _say(f"{way}.")
    return host, port
