"""The same decoder in MaxText, whose settings are what its user writes; see `peers.py`.

`maxtext_program` does what its command does with them, without the command's own loop.
"""

from maxtext_program import program


def start(config, batch, num_devices, layout):
    rows, length = batch["tokens"].shape
    return program(
        batch,
        hardware="cpu",
        dataset_type="synthetic",
        decoder_block="llama2",
        base_emb_dim=config.embed_dim,
        base_num_query_heads=config.num_heads,
        base_num_kv_heads=config.num_kv_heads,
        base_mlp_dim=config.mlp_dim,
        base_num_decoder_layers=config.num_layers,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        normalization_layer_epsilon=config.norm_epsilon,
        per_device_batch_size=rows / num_devices,
        max_target_length=length,
        ici_data_parallelism=num_devices if layout == "data" else 1,
        ici_fsdp_parallelism=num_devices if layout == "fsdp" else 1,
        dtype="float32",
        weight_dtype="float32",
        attention="dot_product",
        remat_policy="minimal_with_context",
        scan_layers=False,
        gradient_clipping_threshold=0,
        enable_checkpointing=False,
        run_name="peers",
    )
