"""Groups of keys: those that change no result, and those of the data and the evaluation."""

from __future__ import annotations

from recbole.utils.argument_list import dataset_arguments, evaluation_arguments

from recbole_llm.data import scenarios

# keys that change where or how a run is logged or saved, but not its result
BOOKKEEPING = {
    *("checkpoint_dir", "config_files", "data_path", "dataloaders_save_path", "dataset_save_path", "device", "gpu_id"),
    *("log_wandb", "note", "save_dataloaders", "save_dataset", "save_every_seconds", "show_progress", "state"),
    *("wandb_project", "report_to", "worker", "merge_full_model", "probe_seconds", "plan_efficiency"),
    *("train_batch_tokens", "gradient_checkpointing", "max_memory", "fsdp"),  # how it is computed
    *("score_batch_tokens", "save_predictions", "predictions_topk", "origin", "predictions"),  # the content of predictions counts
}
# keys of the data and the evaluation; all other keys of ours describe the model, and `init_from` takes them from its run
ABOUT_DATA = {
    *(*evaluation_arguments, *BOOKKEEPING, *scenarios.SETTINGS, *scenarios.TEXTS),
    *("candidates", "mask_history", "eval_users", "slices", "cf_checkpoint", "load_col", "encoding", "init_from"),
    *("rm_dup_inter", "tie_order"),
    *("retriever", "retriever_config", "retriever_top", "scoring", "published_max_new_tokens"),
}
# keys that name columns of features, which are read of a run's own dataset alone
ABOUT_FEATURES = {
    *("load_col", "unload_col", "unused_col", "additional_feat_suffix", "seq_len", "threshold", "preload_weight"),
    *("alias_of_user_id", "alias_of_item_id", "alias_of_entity_id", "alias_of_relation_id"),
    *("normalize_field", "numerical_features", "discretization"),
}
# keys with the settings of a model inside a run, and those that name it
INNER_MODELS = {"cf_config": "cf_model", "cheap_config": "cheap_model", "retriever_config": "retriever"}
# keys whose values a model inside a run has from the run
OF_THE_RUN = {
    *("data_path", "checkpoint_dir", "seed", "gpu_id", "use_gpu", "show_progress", "state", "load_col", "encoding"),
    *(*dataset_arguments, *scenarios.SETTINGS, "tie_order", "mask_history"),
}
# keys of `train_mode: sequence` that change every training, with the values that change nothing; and those of some losses
SEQUENCE_SWITCHES = {"sequence_loss": "recbole", "sequence_warmup_steps": 0, "sequence_ema_decay": None}
SEQUENCE_TRAINING = {*SEQUENCE_SWITCHES, "sequence_negatives", "gbce_t"}
