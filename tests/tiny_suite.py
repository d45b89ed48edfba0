"""The top of a suite that trains the model in `base` on the conversations in `chat.jsonl` for four steps."""

TRAINED = """
model = "./base"
stages = ["retrofit", "train"]
[train]
data = "./chat.jsonl"
tokens = 256
row_length = 32
rows_per_step = 2
heldout_rows = 2
learning_rate = 1e-2
"""
