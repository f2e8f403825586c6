# GPT-2's weights, fine-tuned on tiny Shakespeare: python train.py config/finetune_shakespeare.py
# The text first, in GPT-2's tokens:
# python prepare_data.py shakespeare_gpt2 --input FILE --tokenizer=gpt2
# Larger: --init_from=gpt2-medium, gpt2-large, gpt2-xl, or a folder that has a model.
out_dir = "out/finetune_shakespeare"
init_from = "gpt2"  # needs the packages huggingface_hub and safetensors, and once the network
dataset = "shakespeare_gpt2"

# 32 x 1,024 tokens per step: ten steps read the 300,000 tokens of the text once
batch_size = 1
gradient_accumulation_steps = 32
block_size = 1024
dropout = 0.1

# The weights are good already: small steps of one size, and stop before it memorises the text
learning_rate = 3e-5
decay_lr = False
max_iters = 100
eval_interval = 5
eval_iters = 50  # at most 50 windows: the whole validation split of this text
patience = 5
log_interval = 1
