"""llama.cpp's converter, kept loaded: `python peer_server.py SCRIPT` reads argument lists and converts, one at a time.

Importing torch and transformers costs more than a small conversion, so it is done once. Each request runs in a fork:
the converter keeps state in its classes (some of gguf's name maps change the class that all share), and none of it
may reach the next one. A request is a JSON list of arguments on a line; the answer `{"status": 0, "output": "..."}`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType

OUTPUT_TAIL = 4000


def _load(script: Path) -> ModuleType:
    sys.path.insert(0, str(script.parent))
    specification = importlib.util.spec_from_file_location("peer_converter", script)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _convert(module: ModuleType, arguments: list[str], output_fd: int) -> None:
    """Run the converter in this process, and end it."""
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    status = 1
    try:
        module.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    module = _load(Path(sys.argv[1]))
    import torch
    import transformers

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    _ = transformers.AutoTokenizer
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                _convert(module, json.loads(line), output.fileno())
            _, status = os.waitpid(child, 0)
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - OUTPUT_TAIL))
            said = output.read().decode("utf-8", "replace")
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "output": said}), flush=True)


if __name__ == "__main__":
    main()
