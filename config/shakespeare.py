# Tiny Shakespeare, a token per character: the place to begin. python train.py config/shakespeare.py
#
# On a GPU it trains the "baby GPT", 10.7M parameters; on a CPU a model of 0.4M, in one to three
# minutes on two cores. Both generate something like a play.
import torch

out_dir = "out/shakespeare"
dataset = "shakespeare"
gradient_accumulation_steps = 1
optimizer = "muon"
min_lr = 0.0
eval_iters = 80  # at most 80 batches: the whole validation split of tiny Shakespeare
compile = False  # takes longer to compile than it saves

if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
    batch_size = 64
    block_size = 256
    n_layer = 6
    n_head = 6
    n_embd = 384
    dropout = 0.2  # 800 of these steps read the text 13 times
    learning_rate = 5e-3  # chosen by analogy with the CPU's: not measured yet
    max_iters = 800
    eval_interval = 400
else:
    batch_size = 12
    block_size = 128
    n_layer = 3
    n_head = 3
    n_embd = 96
    learning_rate = 1e-2
    max_iters = 1700
    eval_interval = 500
