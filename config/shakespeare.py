# Tiny Shakespeare, a token per character: the place to begin. python train.py config/shakespeare.py
#
# On a GPU it trains the "baby GPT", 10.7M parameters; on a CPU a model of 0.4M, in one to three minutes on two cores.
# Both write something like a play.
import torch

out_dir = "out/shakespeare"
dataset = "shakespeare"
gradient_accumulation_steps = 1
eval_iters = 0  # the whole validation split

if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
    batch_size, block_size = 64, 256
    n_layer, n_head, n_embd = 6, 6, 384
    dropout = 0.2  # five thousand of these steps read the text eighty times
    learning_rate = 1e-3
    beta2 = 0.99  # few tokens per step: a longer memory steadies them
    max_iters, eval_interval = 5000, 250
else:
    batch_size, block_size = 12, 128
    n_layer, n_head, n_embd = 3, 3, 96
    optimizer = "muon"
    learning_rate, min_lr = 1e-2, 0.0
    max_iters, eval_interval = 1700, 500
    compile = False  # would take longer to compile than it saves
