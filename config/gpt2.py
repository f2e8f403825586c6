# GPT-2 (124M), as in the defaults: torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py
# The text first, a folder of files such as OpenWebText:
# python prepare_data.py openwebtext --input FOLDER --tokenizer=gpt2
out_dir = "out/gpt2"
dataset = "openwebtext"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

# 12 x 40 sequences of 1,024 tokens = 491,520 tokens per step, on any number of GPUs. 40 x 12 is the
# same step: an estimated 5 % faster where memory allows it (python -m extras.plan config/gpt2.py).
# With less memory, make batch_size smaller and gradient_accumulation_steps larger by one factor.
batch_size = 12
gradient_accumulation_steps = 40

learning_rate = 6e-4
max_iters = 600_000  # 300 billion tokens
