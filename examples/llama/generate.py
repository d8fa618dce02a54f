"""Text through the Llama example: python examples/llama/generate.py PROGRAM CHECKPOINT "The lighthouse keeper"

The program knows token ids alone; this puts the checkpoint's tokenizer around it.
"""

import argparse
import subprocess
import sys

from transformers import AutoTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="the built example, build/examples/llama/llama")
    parser.add_argument("checkpoint", help="a folder that `flexq quantize` wrote")
    parser.add_argument("prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    ids = tokenizer(args.prompt).input_ids
    command = [args.program, args.checkpoint, "--tokens", ",".join(map(str, ids)), "--new", str(args.new)]
    if tokenizer.eos_token_id is not None:
        command += ["--stop", str(tokenizer.eos_token_id)]
    result = subprocess.run([*command, *(["--cuda"] if args.cuda else [])], stdout=subprocess.PIPE, text=True)
    if result.returncode == 0:
        print(args.prompt + tokenizer.decode([int(i) for i in result.stdout.split(",")], skip_special_tokens=True))
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
