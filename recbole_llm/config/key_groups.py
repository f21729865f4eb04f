"""Which keys RecBole has but documents nowhere, which change no result, and which are about a run's data and measurement."""

from __future__ import annotations

from recbole.utils.argument_list import evaluation_arguments

from recbole_llm.data import scenarios

# keys that RecBole reads and documents nowhere in its property files
RECBOLE_KEYS = {
    "model",
    "dataset",
    "config_files",
    "nproc",
    "world_size",
    "local_rank",
    "ip",
    "port",
    "offset",
    "single_spec",
    "transform",
    "neg_sampling",
    "training_neg_sample_num",
    "fusion_type",
    "wandb_project",
    "selected_features",
}
# what only changes where or how a run is shown or saved, not its result
BOOKKEEPING = {
    "checkpoint_dir",
    "config_files",
    "data_path",
    "dataloaders_save_path",
    "dataset_save_path",
    "device",
    "gpu_id",
    "log_wandb",
    "note",
    "save_dataloaders",
    "save_dataset",
    "save_every_seconds",
    "show_progress",
    "state",
    "wandb_project",
    "worker",
}
# a run's data and how it is measured: all else of ours is about its model, and taken from the run of `init_from`
ABOUT_DATA = {
    *evaluation_arguments,
    *BOOKKEEPING,
    *scenarios.SETTINGS,
    *scenarios.TEXTS,
    "candidates",
    "eval_users",
    "slices",
    "cf_checkpoint",
    "load_col",
    "init_from",
    "retriever",
    "retriever_config",
    "retriever_top",
}
