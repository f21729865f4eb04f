"""RecBole's own keys: their types, and the successors of those that RecBole no longer has.

RecBole's property files hold their defaults and meanings. The types follow from those and from the code that reads them; a key of
several models has the types of all of them. The grammar is that of the comments in ``properties/``; whole numbers are at least 1.
"""

from __future__ import annotations

from pathlib import Path

from recbole_llm.config.definitions import Definition

_RUN = {
    "(str)": "model dataset data_path checkpoint_dir wandb_project encoding ip",
    "(str) or (list of str)": "config_files",
    "(str in DEBUG, INFO, WARNING, ERROR, CRITICAL, debug, info, warning, error, critical) or ~": "state",
    "(int >= -1) or (str) or (list of int >= 0) or ~": "gpu_id",
    "(int in [0, 4294967295])": "seed",
    "(int >= 0)": "worker epochs eval_step stopping_step loss_decimal_place local_rank offset group_offset",
    "(int)": "train_batch_size eval_batch_size MAX_ITEM_LIST_LENGTH nproc",
    "(float >= 0)": "learning_rate weight_decay",
    "(float in (0, 1))": "tail_ratio",
    "(bool)": "use_gpu reproducibility show_progress save_dataset save_dataloaders log_wandb shuffle require_pow enable_amp "
    "enable_scaler repeatable valid_metric_bigger filter_inter_by_user_or_item kg_reverse_r single_spec verbose",
    "(bool) or ~": "normalize_all",
    "(str) or ~": "dataset_save_path dataloaders_save_path config_file",
    "(str in adam, adamw, sgd, adagrad, rmsprop, sparse_adam, Adam, AdamW, SGD, Adagrad, RMSprop, Sparse_Adam)": "learner",
    "(str in mask_itemseq, inverse_itemseq, crop_itemseq, reorder_itemseq, user_defined) or ~": "transform",
    "(int >= -1)": "world_size",
    "(str) or (int)": "port",
}
_DATA = {
    "(str)": "field_separator seq_separator USER_ID_FIELD ITEM_ID_FIELD RATING_FIELD LABEL_FIELD NEG_PREFIX "
    "ITEM_LIST_LENGTH_FIELD LIST_SUFFIX POSITION_FIELD HEAD_ENTITY_ID_FIELD TAIL_ENTITY_ID_FIELD RELATION_ID_FIELD "
    "ENTITY_ID_FIELD",
    "(str) or ~": "TIME_FIELD",
    "(dict of int) or ~": "seq_len",
    "(dict of float) or ~": "threshold",
    "(dict of list) or ~, replaced as a whole": "unload_col unused_col",
    "(dict of str) or ~": "preload_weight",
    "(dict of interval or list) or ~": "val_interval",
    "(interval) or ~": "user_inter_num_interval item_inter_num_interval entity_kg_num_interval relation_kg_num_interval",
    "(list of str) or (str) or ~": "additional_feat_suffix",
    "(list of str)": "numerical_features",
    "(list of str) or ~": "alias_of_user_id alias_of_item_id alias_of_entity_id alias_of_relation_id normalize_field "
    "benchmark_filename",
    "(str in first, last) or ~": "rm_dup_inter",
    "(dict) or ~": "discretization clip_grad_norm",
}
_NEGATIVES = {
    "(dict) or ~": "train_neg_sample_args",
    "(str in uniform, popularity) or ~": "train_neg_sample_args.distribution",
    "(int)": "train_neg_sample_args.sample_num",
    "(float >= 0)": "train_neg_sample_args.alpha",
    "(bool)": "train_neg_sample_args.dynamic",
    "(int >= 0)": "train_neg_sample_args.candidate_num",
}
_MODELS = {
    "(int)": "attention_size block_num class_num conv_kernel_size critic_k cross_layer_num depth embedding_size expert_num "
    "gcn_output_dim hidden_dimension hidden_size high_order history_len history_num_per_term inner_size interest_size "
    "item_agg_layer item_embedding_size k k_interests kernel_size kfac kg_embedding_size kge_interval latent_dimension "
    "lightgcn_layer low_rank m_step metrics_k mf_embedding_size mlp_embedding_size n_cate n_dec_epochs n_enc_epochs n_facet_all "
    "n_factors n_heads n_hop n_hops n_iter n_iterations n_layers n_memory neigh_embedding_size neighbor_sample_size "
    "num_basis_functions num_clusters num_conv_kernel num_heads num_layers order order_len pool_kernel_size pretrain_epochs "
    "prototype_size rank save_step short_item_length step steps t_depth topk_factor train_kg_step train_rec_step "
    "ui_embedding_size user_embedding_size weight_size context_hops lgb_num_boost_round xgb_num_boost_round",
    "(int >= 0)": "anneal_steps high_layers_num hyper_layers low_layers_num n_facet n_facet_context n_facet_emb "
    "n_facet_hidden n_facet_reranker nh nv neigh_num sampling_steps split_to token_num_threhold token_num_threshold "
    "total_anneal_steps vae_anneal_steps warm_up_step",
    "(int in (-inf, 0])": "n_facet_MLP n_facet_window",
    "(int in [0, 1]) or (bool)": "context_norm post_remove_context use_proj_bias",
    "(float in [0, 1))": "attn_dropout_prob dropout dropout_prob drop_ex drop_im drop_ratio hidden_dropout_prob item_dropout "
    "mess_dropout mess_dropout_rate message_dropout node_dropout node_dropout_rate sess_dropout",
    "(float in [0, 1])": "corruption_ratio ft_ratio l1_ratio lambda_coeff global_ratio",
    "(float in (0, 1])": "mask_ratio",
    "(str in gelu, relu, swish, tanh, sigmoid)": "hidden_act",
    "(str in trm, ave)": "dnn_type",
    "(float > 0)": "initializer_range layer_norm_eps resolution ssl_tau ssl_temp tau temperature",
    "(float)": "aap_weight align_weight anneal_cap cor_weight gamma kg_weight lambda1 lambda2 lamda lmd lmd_sem ls_weight "
    "map_weight margin mip_weight negative_weight noise_max noise_min noise_scale proto_reg q reg_loss_ratio reg_weight_1 "
    "reg_weight_2 rho second_order_loss_weight shrink sim_regularity sp_weight spatial_ratio ssl_reg ssl_weight tau_ratio "
    "vae_anneal_cap w_max w_min weight eta",
    "(float) or (list of float)": "reg_weight",
    "(float) or (bool)": "std",
    "(list of int)": "cin_layer_size cnn_channels cnn_kernels cnn_strides critic_layers dilations dims_dnn encoder_hidden_size "
    "hidden_size_list in_dims item_hidden_size_list layers mlp_hidden_size order_list out_dims t_cin user_hidden_size_list",
    "(list of float in [0, 1))": "dropout_probs",
    "(list of float)": "mixture_weights reg_weights",
    "(list of str)": "selected_features",
    "(bool)": "L1_flag apply_norm beta_fixed build_graph_separately center_columns convert_token_to_onehot direct double_tower "
    "dual_domain fredom freeze_kg hide_item joint_train mf_train mixed mlp_train nogb positive_only reparam reweight "
    "sampling_noise sparse_feature use_inner use_inner_product use_out_emb use_outer use_pretrain use_st_gumbel norm "
    "has_residual use_filter time-aware",
    "(bool) or (int) or ~": "xgb_silent xgb_verbose_eval",
    "(int) or ~": "lgb_early_stopping_rounds xgb_early_stopping_rounds xgb_nthread",
    "(dict) or ~": "fields lgb_params xgb_params",
    "(str) or ~": "mf_pretrain_path mlp_pretrain_path pretrain_path pre_model_path warm_up xgb_model fredom_type",
    "(str)": "accum aggregator aggregator_type algorithm gru_type hid_activation out_activation ae_act_func "
    "mlp_act_func ind inter_matrix_type item_attribute knn_method loss_function mean_type neigh_info_method "
    "noise_schedule partition_merging_mode reranker_merging_mode phase pooling_mode pooling_type pooling_type_layer_1 "
    "pooling_type_layer_2 structure teacher train_method train_stage type weight_mode fusion_type sim contrast",
    "(str in BPR, CE, BCE, MSE)": "loss_type",
    "(int) or (str)": "reranker_CAN_NUM",
}


def _definitions() -> dict[str, Definition]:
    found = {}
    for table in (_RUN, _DATA, _NEGATIVES, _MODELS):
        for comment, keys in table.items():
            definition = Definition.read(comment, Path(__file__))
            assert definition, comment
            found.update(dict.fromkeys(keys.split(), definition))
    return found


RECBOLE_DEFINITIONS = _definitions()
"""The definitions of RecBole's keys; a property file of ours that defines one, too, is preferred."""
MODEL_KEYS = {key for keys in _MODELS.values() for key in keys.split()}
"""The settings of RecBole's models, each of which has some of them in its property file."""

_SPLIT = "give eval_args: {'split': {'RS': [0.8, 0.1, 0.1]}} for ratios, {'split': {'LS': 'valid_and_test'}} for leave-one-out"
_NUMBER = "give an interval, '[5,inf)'; the key is"
_VALUES = "give val_interval: {'FIELD': '[3,inf)'}"
_DRAWN = "give train_neg_sample_args: {'distribution': 'uniform', 'sample_num': 1}"

SUCCESSORS = {
    "eval_setting": "give eval_args: {'split': ..., 'order': 'TO' or 'RO', 'mode': 'full', 'uniN' or 'candidates'}",
    "group_by_user": "give eval_args: {'group_by': 'user'} for True, {'group_by': 'none'} for False",
    "split_ratio": _SPLIT,
    "leave_one_out_num": _SPLIT,
    "real_time_process": "remove it; examples are always made when they are needed",
    "neg_sampling": _DRAWN,
    "training_neg_sample_num": _DRAWN,
    "training_neg_sample_distribution": _DRAWN,
    "train_neg_sampling": _DRAWN,
    "min_user_inter_num": f"{_NUMBER} user_inter_num_interval",
    "max_user_inter_num": f"{_NUMBER} user_inter_num_interval",
    "min_item_inter_num": f"{_NUMBER} item_inter_num_interval",
    "max_item_inter_num": f"{_NUMBER} item_inter_num_interval",
    "lowest_val": _VALUES,
    "highest_val": _VALUES,
    "equal_val": _VALUES,
    "not_equal_val": _VALUES,
    "drop_filter_field": "remove it, or give unused_col: {'inter': ['FIELD']}",
    "drop_preload_weight": "remove it",
    "fields_in_same_space": "give alias_of_user_id, alias_of_item_id, alias_of_entity_id or alias_of_relation_id",
    "multi_gpus": "remove it; a run is one process",
    "topks": "give topk",
    "device": "give use_gpu: False for the CPU, or gpu_id: 0, the number of a GPU",
    "tensorboard": "give report_to: tensorboard",
    "eval_metric": "give metrics, a list, and valid_metric, which decides",
    "metric": "give metrics, a list",
}
"""What takes the place of keys of earlier versions of RecBole, or of other software."""
