# Tiny Shakespeare, a token a character: the place to begin. python train.py config/shakespeare.py
#
# What it trains depends on the device. On a GPU: the "baby GPT", 6 layers, 384 wide, 10.7M parameters. On a CPU: 4
# layers, 128 wide, 0.8M parameters, which takes about a minute on two cores. Both write something like a play.
import os

import torch

out_dir = "out/shakespeare"
dataset = "shakespeare"
eval_interval = 250
eval_iters = 0  # the whole validation split
_ranks = int(os.environ.get("WORLD_SIZE", 1))  # one, or what torchrun was asked for: each takes one micro-batch a step
gradient_accumulation_steps = _ranks

if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
    batch_size = 64 // _ranks
    block_size = 256
    n_layer = n_head = 6
    n_embd = 384
    dropout = 0.2  # five thousand of these steps read the text eighty times
    learning_rate = 1e-3
    beta2 = 0.99  # few tokens a step: a longer memory steadies them
    warmup_iters = 100
    max_iters = lr_decay_iters = 5000
else:
    batch_size = 16 // _ranks
    block_size = 128
    n_layer = n_head = 4
    n_embd = 128
    optimizer = "muon"  # 1.65 after 700 of these steps, where AdamW with a rate of 6e-3 comes to 1.90
    learning_rate = 1e-2
    min_lr = 1e-4
    beta2 = 0.99
    warmup_iters = 100
    max_iters = lr_decay_iters = 1000  # for a longer run raise both
    compile = False  # would take longer to compile than it saves
    dtype = "float32"  # a run on two ranks stays close to one on one; bfloat16 can be up to 1.6 times as fast

if os.environ.get("RANK", "0") == "0":
    print(f"config/shakespeare.py: {n_layer} layers, {n_embd} wide, the size for a {'GPU' if n_layer == 6 else 'CPU'}")
