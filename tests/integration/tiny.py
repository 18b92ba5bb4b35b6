"""A run of seconds, for processes to be killed in: get_config("STORE,fast" or "STORE,plain")."""

from ttt_e2e.config import default_config


def get_config(arg):
    store, kind = arg.split(",")
    config = default_config()
    config.model.update({"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2})
    config.model.update({"num_attention_heads": 2, "sliding_window": 12, "num_fast_blocks": int(kind == "fast")})
    config.inner.update({"mini_batch_size": 8, "learning_rate": 0.5, "warmup_steps": 3})
    config.train.update({"seq_len": 32, "global_batch_size": 8, "num_steps": 12})
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 2})
    config.data.update({"path": store, "bos_id": 1})
    config.checkpoint.update({"every_steps": 3})
    config.log.update({"every_steps": 1})
    config.eval.update({"every_steps": 6, "batch_size": 4, "num_sequences": 6})
    return config
