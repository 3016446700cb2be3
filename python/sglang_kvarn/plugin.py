# SPDX-License-Identifier: Apache-2.0
"""Where this plugin reaches into SGLang: the table of hooks, and when they are handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_kvarn import (
    admission,
    balanced_layers,
    budget,
    checksums,
    compat,
    drafts,
    fences,
    hook,
    refusals,
    refused,
    report,
    rings,
    settings,
    transfer,
)
from sglang_kvarn.hook import Hook


def _build_pool(original: Callable[..., Any], configurator: Any, *args: Any, **kwargs: Any) -> Any:
    if settings.target_preset(configurator) is None:
        return original(configurator, *args, **kwargs)
    # the pool subclasses SGLang's, so its module is imported once SGLang builds a kvarn pool, not when plugins load
    from sglang_kvarn import mixed_pool, pool

    sizes = kwargs["sizes"]
    tokens, sliding_tokens = sizes.max_total_num_tokens, sizes.swa_max_total_num_tokens
    records = pool.build(
        configurator,
        max_total_num_tokens=tokens,
        sliding_tokens=sliding_tokens or 0,
        req_to_token_pool=kwargs["req_to_token_pool"],
    )
    if not (ids := budget.sliding_layer_ids(configurator)):
        return records
    ranks = compat.get_parallel().attn_tp_size
    shape = compat.sliding_shape(configurator.model_config, ranks)
    return mixed_pool.MixedPool(records, sliding_tokens, ids, shape)


def _take_model(result: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Balance the model that was just loaded, or refuse a draft model. Hook after ``ModelRunner.load_model``."""
    if settings.preset_of(model_runner.server_args) is None:
        return
    if model_runner.is_draft_worker:
        refusals.check_draft_model(model_runner.model, model_runner.model_config)
    else:
        balanced_layers.balance_layers(model_runner)


def _compose_backends(original: Callable[..., Any], runner: Any, full_attn_backend: Any) -> Any:
    """Attend sliding windows by what SGLang made, and records by our backend."""
    pool = runner.token_to_kv_pool
    if rings.of_pool(getattr(pool, "full_kv_pool", None)) is None:
        return original(runner, full_attn_backend)
    from sglang_kvarn.mixed_backend import MixedBackend

    ids = [layer for layer, (_, is_sliding) in pool.layers_mapping.items() if is_sliding]
    return MixedBackend(_create_backend(runner), full_attn_backend, ids)


def _choose_host_pool(original: Callable[..., Any], source: Any) -> Any:
    """Name the class of host memory for a pool, or, from 0.5.23 on, for what its `get_device_pool_infos` returns."""
    if rings.of_pool(getattr(source, "pool", source)) is None:
        return original(source)
    from sglang_kvarn.host_pool import KVarNHostPool

    return KVarNHostPool


def _hold_states(original: Callable[..., bool], strategy: Any, kvcache: Any, components: Any) -> bool:
    """Let SGLang build host memory for states beside our pool. Hook around ``_MambaStrategy.matches``."""
    if rings.of_pool(kvcache) is None or kvcache.states is None:
        return original(strategy, kvcache, components)
    return True


def _resolve(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse what was typed before SGLang can advise otherwise, and fill what was left open."""
    settings.apply_defaults(server_args)
    is_ours = settings.preset_of(server_args) is not None
    if is_ours and not compat.is_resolved(server_args):
        drafts.apply_defaults(server_args)
    refusals.check_typed(server_args)
    if is_ours:
        register_rest()


def _refuse(result: Any, server_args: Any) -> None:
    if settings.preset_of(server_args) is not None:
        hook.verify_hooks()
    refusals.check_arguments(compat.resolved_arguments(server_args))


_CONFIGURATOR = "mem_cache.kv_cache_configurator.KVCacheConfigurator"
_WEIGHTS = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_SOURCES = ("disk", "distributed", "tensor", "ipc")


def _weight_hooks() -> list[Hook]:
    """Return the hooks on what reads or writes the weights of a running server, by its one parameter."""
    why_writes = "The weights of a checkpoint would take the place of balanced ones."
    why_reads = "Whoever asks for the weights would get balanced ones."
    methods = [
        *((f"{_WEIGHTS}.update_weights_from_{source}", "recv_req", why_writes) for source in _SOURCES),
        *((f"{_WEIGHTS}.{name}", "recv_req", why_reads) for name in ("get_weights_by_name", "check_weights")),
        *((f"{_WEIGHTS}.save_{kind}_model", "params", why_reads) for kind in ("remote", "sharded")),
        ("managers.scheduler.Scheduler.send_weights_to_remote_instance", "recv_req", why_reads),
    ]
    function = balanced_layers.with_plain_weights
    return [Hook(target, "around", ("self", parameter), function, why) for target, parameter, why in methods]


_SENDER = "disaggregation.prefill.SchedulerDisaggregationPrefillMixin"
_RECEIVER, _ROWS = "disaggregation.decode.DecodePreallocQueue", "disaggregation.decode.DecodeReqToTokenPool"
# allocates and frees rows as the rows of other servers do
_ROWS_WITH_STATES = "disaggregation.decode.HybridMambaDecodeReqToTokenPool"


def _transfer_hooks() -> list[Hook]:
    """Return the hooks on what sends and receives requests between servers."""
    needs_room = "A request could be received for which there is no ring, which ends the server."
    hooks: list[tuple[str, str, tuple[str, ...], Callable[..., Any], str]] = [
        (
            "disaggregation.utils.setup_state_kv_args",
            "after",
            ("kv_args", "token_to_kv_pool", "req_to_token_pool"),
            transfer.describe,
            "The exact tokens of a request would not be sent, and nobody would ask whether pages mean the same.",
        ),
        (
            f"{_SENDER}.send_kv_chunk",
            "before",
            ("self", "req", "last_chunk"),
            transfer.send_exact_start,
            "A decode server would read exact tokens that nobody has written.",
        ),
        (
            "disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req",
            "before",
            ("self", "decode_req"),
            transfer.take_exact_start,
            "A decode server would read exact tokens that nobody has written.",
        ),
        (
            f"{_RECEIVER}._ensure_prefill_info",
            "around",
            ("self", "addr_to_reqs"),
            transfer.check_senders,
            "A decode server would read pages of another format, or end because of them.",
        ),
        (
            f"{_RECEIVER}._send_kv_metadata",
            "before",
            ("self",),
            fences.before_receiving,
            "A step of the last owner of a page could write to it after another server has.",
        ),
        (
            f"{_RECEIVER}._required_admission_tokens",
            "after",
            ("self", "req"),
            transfer.charge_ring,
            needs_room,
        ),
        (
            f"{_RECEIVER}._prealloc_required_tokens",
            "after",
            ("self", "req"),
            transfer.charge_ring_of_retracted,
            needs_room,
        ),
        (
            "disaggregation.decode.SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run",
            "before",
            ("self", "running_batch"),
            transfer.finish_step,
            "The state of a request that a decode server takes back would be moved on by one token twice.",
        ),
        (
            f"{_ROWS}.alloc",
            "around",
            ("self", "reqs"),
            rings.alloc_rows,
            "A request that is received would have no ring.",
        ),
        (
            f"{_ROWS}.free",
            "around",
            ("self", "req"),
            rings.free_row,
            "The pages of its ring would be lost with its row.",
        ),
        *(
            (
                f"{rows}.clear",
                "after",
                ("self",),
                rings.forget_rows,
                "Pages that a flush made free would be given back a second time.",
            )
            for rows in (_ROWS, _ROWS_WITH_STATES)
        ),
    ]
    return [Hook(*hook, since=compat.TRANSFERS_SINCE) for hook in hooks]


ALL_HOOKS = (
    Hook(
        "server_args.ServerArgs.add_cli_args",
        "after",
        ("parser",),
        settings.add_choices,
        why="The command line would refuse the names of the presets.",
        replaced_by="names of registered formats are choices",
        where="arguments",
    ),
    Hook(
        "server_args.ServerArgs.add_cli_args",
        "after",
        ("parser",),
        refused.print_sentence,
        why="A command that is refused would end with a traceback.",
        where="arguments",
    ),
    Hook(
        compat.resolution_target(),
        "before",
        ("self",),
        _resolve,
        why="The user would have to name the attention backend, pages of 128 tokens, and what a CPU needs.",
        replaced_by="`attention_backend`, `page_size` of the format; what a CPU needs stays a hook",
        where="arguments",
    ),
    Hook(
        compat.resolution_target(),
        "around",
        ("self",),
        refusals.resolve_or_refuse,
        why="SGLang would refuse some models by arguments that the user never gave.",
        where="arguments",
    ),
    Hook(
        "server_args.ServerArgs.check_server_args",
        "after",
        ("self",),
        _refuse,
        why="What a kvarn cache does not serve would fail in a process of the server, or answer wrongly.",
        replaced_by="`check_server_args`",
        where="arguments",
    ),
    Hook(
        "entrypoints.engine.Engine._launch_scheduler_processes",
        "around",
        ("server_args", "port_args", "run_scheduler_process_func"),
        refused.launch_schedulers,
        why="A scheduler could not send its refusal to the process that started it.",
        where="launch",
    ),
    Hook(
        "entrypoints.engine._wait_for_scheduler_ready",
        "around",
        ("scheduler_pipe_readers", "scheduler_procs"),
        refused.raise_refusal,
        why="What a scheduler refuses would not be raised where a program can catch it.",
        where="launch",
    ),
    Hook(
        "managers.scheduler.Scheduler.__init__",
        "around",
        ("self", "server_args"),
        refused.leave_scheduler,
        why="A scheduler that refuses would print a traceback and kill the process that started it.",
    ),
    Hook(
        "model_executor.model_runner.ModelRunner.load_model",
        "after",
        ("self",),
        _take_model,
        why="Channels that are much larger than others would cost the cache its accuracy, and a draft model that ranks "
        "with requests of their own cannot run would fail in its first step.",
    ),
    Hook(
        "mem_cache.kv_cache_dtype.configure_kv_cache_dtype",
        "around",
        ("server_args_kv_cache_dtype", "model_dtype", "is_draft_worker"),
        settings.cache_dtype,
        why="The storage type of a preset, uint8, would be unknown; a draft model keeps its own.",
        replaced_by="`storage_dtype`",
    ),
    Hook(
        "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "around",
        ("self", "kvc", "num_layers"),
        budget.cell_size,
        why="A token would be charged as keys and values of one byte per channel.",
        replaced_by="`bytes_per_token`",
    ),
    Hook(
        "model_executor.pool_configurator.DefaultPoolConfigurator.__init__",
        "after",
        ("self", "kvc"),
        drafts.charge_draft,
        why="A token of a draft model would be charged as if it were quantised too.",
    ),
    Hook(
        "speculative.cpp_ngram.ngram_corpus.NgramCorpus.batch_get",
        "after",
        ("self", "req_ids", "batch_tokens", "total_lens"),
        drafts.keep_chains,
        why="A token that fills up a short chain could be accepted out of its place.",
    ),
    Hook(
        "model_executor.pool_configurator.create_memory_pool_configurator",
        "around",
        ("kvc",),
        budget.choose_sizes,
        why="Tokens and sliding windows of a model with both would share memory by the bytes of another cache.",
    ),
    Hook(
        "layers.attention.attention_registry.attn_backend_wrapper",
        "around",
        ("runner", "full_attn_backend"),
        _compose_backends,
        why="A backend of SGLang's would attend the records of a model with sliding windows, too.",
    ),
    Hook(
        f"{_CONFIGURATOR}._handle_max_mamba_cache",
        "before",
        ("self", "total_rest_memory"),
        budget.split_memory,
        why="States of a hybrid model would get a share that is made for tokens of 16 bits.",
    ),
    Hook(
        f"{_CONFIGURATOR}._profile_available_bytes",
        "after",
        ("self", "pre_model_load_memory"),
        budget.charge_fixed_bytes,
        why="The workspaces would have no memory, and the number of requests that they are made for would be open.",
        replaced_by="`fixed_bytes`, asked for before tokens are counted",
    ),
    Hook(
        f"{_CONFIGURATOR}.resolve_max_num_reqs",
        "after",
        ("self", "token_capacity"),
        budget.cap_rows,
        why="There would be more rows than the workspaces are made for.",
        replaced_by="`max_requests`",
    ),
    Hook(
        f"{_CONFIGURATOR}._build_token_to_kv_pool",
        "around",
        ("self", "sizes", "req_to_token_pool"),
        _build_pool,
        why="The pool would not hold records, and the rows of requests would have no rings.",
        replaced_by="`build_pool`",
    ),
    Hook(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.__init__",
        "after",
        ("self", "kvcache"),
        rings.attach_allocator,
        why="Rings would not know whose pages they take.",
    ),
    Hook(
        "mem_cache.pool_host.mha.get_mha_host_pool_cls",
        "around",
        (),
        _choose_host_pool,
        why="HiCache would copy the row of each slot, and a slot has none.",
    ),
    Hook(
        "mem_cache.hybrid_cache.hybrid_pool_assembler._MambaStrategy.matches",
        "around",
        ("self", "kvcache", "components"),
        _hold_states,
        why="Host memory of a hybrid model would take the pool for one without states.",
        since=compat.HOSTS_STATES_SINCE,
    ),
    Hook(
        "speculative.base_spec_worker._can_pack_hicache_mtp",
        "around",
        ("spec_algorithm", "draft_runners"),
        drafts.keep_apart,
        why="Host memory would put the layer of a draft model into pages of records, as one more of them.",
        since="0.5.23",
    ),
    Hook(
        "mem_cache.unified_radix_cache.UnifiedRadixCache.init_load_back",
        "around",
        ("self", "params"),
        admission.begin_where_a_load_failed,
        why="A request of a hybrid model whose load from host memory fails would go on from a state of zeros.",
        since=compat.HOSTS_STATES_SINCE,
    ),
    Hook(
        "mem_cache.hicache_storage.HiCacheStorage.register_mem_host_pool_v2",
        "around",
        ("self", "host_pool", "host_pool_name"),
        checksums.seal,
        why="A damaged file of a state or of sliding windows would be taken for one, and answers would be wrong.",
        since=compat.HOSTS_STATES_SINCE,
    ),
    Hook(
        "managers.cache_controller.HiCacheController.start_writing",
        "before",
        ("self",),
        fences.before_writing,
        why="Before 0.5.23 a page could be copied to the host before the step that encodes it has run.",
    ),
    Hook(
        "managers.cache_controller.HiCacheController.start_loading",
        "before",
        ("self",),
        fences.before_loading,
        why="Before 0.5.20 a page could be loaded while a step of its last owner still writes to it.",
    ),
    Hook(
        "managers.scheduler.Scheduler.attach_hicache_storage_wrapped",
        "around",
        ("self", "recv_req"),
        refusals.attach_or_refuse,
        why="A running server could be given a storage that is refused at its start.",
    ),
    Hook(
        "mem_cache.memory_pool.ReqToTokenPool.alloc",
        "around",
        ("self", "reqs"),
        rings.alloc_rows,
        why="A request would have no ring, and nobody would know how much of it came from the prefix cache.",
    ),
    Hook(
        "mem_cache.memory_pool.ReqToTokenPool.free",
        "around",
        ("self", "req"),
        rings.free_row,
        why="The pages of a ring would be lost with the row of its request.",
    ),
    Hook(
        "mem_cache.memory_pool.ReqToTokenPool.clear",
        "after",
        ("self",),
        rings.forget_rows,
        why="Pages that a flush made free would be given back a second time.",
    ),
    Hook(
        "managers.schedule_policy.PrefillAdder.add_one_req",
        "around",
        ("self", "req"),
        admission.add_with_ring,
        why="A request could be admitted whose ring cannot be allocated.",
    ),
    Hook(
        "managers.scheduler.Scheduler.init_model_worker",
        "after",
        ("self",),
        admission.limit_lengths,
        why="A request that fills the pool would wait without end for a ring beside it.",
    ),
    Hook(
        "managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._get_total_uncached_sizes",
        "after",
        ("self",),
        admission.count_rings,
        why="SGLang's memory checks of a busy server would take rings for lost pages.",
    ),
    Hook(
        "managers.scheduler.Scheduler.get_internal_state",
        "after",
        ("self", "recv_req"),
        report.add_to_server_info,
        why="`/server_info` would not say what the cache holds.",
    ),
    Hook(
        "managers.schedule_batch.Req._compute_max_prefix_len",
        "after",
        ("self", "input_len"),
        rings.limit_prefix,
        why="A request that lost its row would find its own prompt in the prefix cache, and read other values.",
    ),
    *_weight_hooks(),
    *_transfer_hooks(),
)
# those for the installed SGLang
HOOKS = tuple(each for each in ALL_HOOKS if compat.is_since(each.since))
hook.declare(HOOKS)


def register_all() -> None:
    """Check version and signatures, then hand attention backend and hooks to SGLang.

    A process that another one started gets every hook it needs. The first process of a program gets those of the
    arguments: the others take seconds to import, which a command with an argument that is refused need not wait for.
    They follow with `register_rest`.

    Raises:
        RuntimeError: nothing was registered; the message names what does not fit.
    """
    if hook.registered_hooks():
        return
    compat.check_version()
    chosen = [h for h in hook.needed_hooks() if h.where == "arguments" or not hook.is_first_process()]
    hook.check_signatures(chosen)
    compat.add_attention_backend_choices([settings.ATTENTION_BACKEND])
    compat.register_attention_backend(settings.ATTENTION_BACKEND)(_create_backend)
    hook.register(chosen)


def register_rest() -> None:
    """Put the hooks in place that `register_all` left out; does nothing where they are.

    Raises:
        RuntimeError: none of them was registered; the message names what does not fit.
    """
    rest = [h for h in hook.needed_hooks() if h not in hook.registered_hooks()]
    if rest:
        hook.check_signatures(rest)
        hook.register(rest)
        compat.HookRegistry.apply_hooks()


def _create_backend(model_runner: Any) -> Any:
    from sglang_kvarn.backend import KVarNAttentionBackend

    return KVarNAttentionBackend(model_runner)
