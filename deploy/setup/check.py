"""Check a finished environment, from inside it: `python check.py cpu|cuda`. Fails with the reason."""

import sys
from importlib.metadata import entry_points, version

import torch
import vllm.platforms

device = sys.argv[1]
if device == "cpu":
    assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build; the CPU build is wanted"
    assert vllm.platforms.current_platform.is_cpu(), f"vLLM {version('vllm')} does not see the CPU platform"
else:
    assert torch.cuda.is_available(), f"torch {torch.__version__} sees no GPU"

plugins = {plugin.name: plugin for plugin in entry_points(group="vllm.general_plugins")}
assert "power" in plugins, f"vLLM finds only these plugins: {sorted(plugins)}"
plugins["power"].load()
