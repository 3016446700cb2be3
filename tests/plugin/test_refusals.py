# SPDX-License-Identifier: Apache-2.0
"""Each refusal is one sentence before any process is spawned, and a plain configuration is not refused."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn import compat, refusals, storage_keys
from sglang_kvarn.refused import Refused

# argument, refused value, a word of the sentence
CASES = [
    ("attention_backend", "torch_native", "--attention-backend"),
    ("prefill_attention_backend", "fa3", "--prefill-attention-backend"),
    ("decode_attention_backend", "fa3", "--decode-attention-backend"),
    ("page_size", 64, "needs a page size of 128, not 64,"),
    ("chunked_prefill_size", 100, "a multiple of the page size 128, or -1 for prompts in one piece, not 100"),
    ("max_total_tokens", 383, "needs a --max-total-tokens of at least 384, not 383,"),
    ("device", "xpu", "needs an NVIDIA GPU or a CPU"),
    *(("speculative_algorithm", name, f"--speculative-algorithm {name}") for name in refusals._OTHER_DRAFTS),
    ("speculative_algorithm", "MY_PLUGIN", "only the verification of SGLang's own chains of drafts is tested"),
    ("speculative_draft_attention_backend", "kvarn", "--speculative-draft-attention-backend"),
    ("enable_multi_layer_eagle", True, "--enable-multi-layer-eagle"),
    ("encoder_only", True, "--encoder-only"),
    ("enable_hisparse", True, "--enable-hisparse"),
    ("enable_lmcache", True, "--enable-lmcache"),
    ("enable_flexkv", True, "--enable-flexkv"),
    ("enable_unified_cache_external_linker", True, "--enable-unified-cache-external-linker"),
    ("enable_kv_cache_sharding", True, "--enable-kv-cache-sharding"),
    ("radix_cache_backend", "other", "--radix-cache-backend"),
    ("enable_deterministic_inference", True, "--enable-deterministic-inference"),
    ("rl_on_policy_target", "fsdp", "--rl-on-policy-target"),
    ("enable_torch_compile", True, "--enable-torch-compile"),
    ("enable_memory_saver", True, "--enable-memory-saver"),
    ("dcp_size", 2, "--dcp-size"),
    ("attn_cp_size", 2, "--attn-cp-size"),
    ("enable_prefill_cp", True, "--enable-prefill-cp"),
    ("enable_two_batch_overlap", True, "--enable-two-batch-overlap"),
    ("enable_single_batch_overlap", True, "--enable-single-batch-overlap"),
    ("enable_pdmux", True, "--enable-pdmux"),
    ("dllm_algorithm", "LowConfidence", "--dllm-algorithm"),
    ("enable_streaming_session", True, "--enable-streaming-session"),
    ("enable_session_radix_cache", True, "--enable-session-radix-cache"),
    ("enable_mis", True, "--enable-mis"),
    ("enable_page_major_kv_layout", True, "--enable-page-major-kv-layout"),
    ("enable_unified_memory", True, "--enable-unified-memory"),
    ("prefill_only_disable_kv_cache", True, "--prefill-only-disable-kv-cache"),
    ("kv_canary", "raise", "--kv-canary"),
    ("enable_nvidia_megakernel", True, "--enable-nvidia-megakernel"),
    ("use_ray", True, "--use-ray"),
]
# beside --enable-hierarchical-cache; on the platform of these tests it is served itself
NGRAM = {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1}
# of a draft model
CHAIN = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
HOST_MEMORY = [
    ({"hicache_storage_backend": "nixl"}, "--hicache-storage-backend", "--hicache-storage-backend, or"),
    ({"hicache_io_backend": "direct"}, "--hicache-io-backend direct", "set it to kernel"),
    ({"hicache_mem_layout": "page_head"}, "--hicache-mem-layout page_head", "drop --hicache-mem-layout"),
]
HOST_MODE = "hicache_host_memory_mode"
if compat.has_argument(HOST_MODE):
    HOST_MEMORY.append(({HOST_MODE: "buffer_only"}, "--hicache-host-memory-mode buffer_only", "drop --hicache-host"))
# beside --disaggregation-mode; on the platform of these tests it is served itself, from 0.5.23 on
TRANSFER = [
    ({"disaggregation_transfer_backend": "nixl"}, "set it to mooncake or mooncake_tcp"),
    ({"disaggregation_decode_retraction_backup": "host_pool"}, "set it to cpu_tensor"),
    ({"disaggregation_decode_enable_radix_cache": True}, "drop --disaggregation-decode-enable-radix-cache"),
    ({"disaggregation_decode_enable_offload_kvcache": True}, "drop --disaggregation-decode-enable-offload-kvcache"),
    (
        {"disaggregation_decode_allocation_policy": "prefill_complete"},
        "drop --disaggregation-decode-allocation-policy",
    ),
    (
        {"disaggregation_decode_host_receive_threshold": 0.5},
        "drop --disaggregation-decode-host-receive-threshold",
    ),
    ({"disaggregation_enable_kv_checksum": True}, "drop --disaggregation-enable-kv-checksum"),
    ({"optimistic_prefill_attempts": 1}, "drop --optimistic-prefill-attempts"),
    ({"enable_pd_role_switch": True}, "drop --enable-pd-role-switch"),
    ({"hicache_storage_backend": "file", "enable_hierarchical_cache": True}, "drop --hicache-storage-backend"),
    ({"speculative_algorithm": "STANDALONE", "speculative_eagle_topk": 1}, "set it to EAGLE, EAGLE3, NEXTN or DFLASH"),
    (
        {"speculative_draft_window_size": 64, "speculative_algorithm": "DFLASH"},
        "drop --speculative-draft-window-size",
    ),
    ({"pp_size": 2}, "drop --pp-size"),
]
TRANSFER_VARIABLES = {
    "SGLANG_DISAGG_STAGING_BUFFER": "1",
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE": "0",
}
TWO_RANKS = {"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}
# arguments of DP attention, how a refusal begins, what it says to drop
DP_ATTENTION = [
    (
        {"enable_dp_attention": True, "dp_size": 2},
        "--enable-dp-attention with --dp-size 2",
        "--enable-dp-attention and --dp-size",
    )
]
if compat.has_argument("attn_dp_size"):
    DP_ATTENTION.append(({"attn_dp_size": 2}, "--attn-dp-size 2", "--attn-dp-size"))
INSTALLED = [case for case in CASES if compat.has_argument(case[0])]
GRAPHS = [
    ("prefill", "full"),
    ("prefill", "tc_piecewise"),
    ("decode", "breakable"),
    ("decode", "tc_piecewise"),
]
VARIABLES = ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_USE_HND_KVCACHE"]


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """Keep the cores of ranks out of the environment of later tests, where resolving more than one rank puts them."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")


class Changed:
    """Resolved arguments of which some are others."""

    def __init__(self, args, **changes) -> None:
        self.__dict__.update(changes, _args=args)

    def __getattr__(self, name):
        return getattr(self._args, name)


@pytest.fixture(scope="module")
def served(server_args, model_dir):
    """Arguments that are served."""
    args = server_args(model_path=model_dir(), kv_cache_dtype="kvarn")
    args.check_server_args()
    return compat.resolved_arguments(args)


def refused(args) -> str:
    with pytest.raises(ValueError) as error:
        refusals.check_arguments(args)
    return str(error.value)


@pytest.mark.parametrize(("name", "value", "word"), INSTALLED, ids=[case[0] for case in INSTALLED])
def test_check_arguments_names_the_flag_the_reason_and_the_way_out(served, name, value, word):
    getattr(served, name)
    message = refused(Changed(served, **{name: value}))
    assert word in message and "--kv-cache-dtype kvarn" in message and "\n" not in message
    assert "{" not in message
    _, colon, way_out = message.rpartition(": ")
    assert colon and way_out.split()[0] in ("drop", "raise", "set")


@pytest.mark.parametrize(("phase", "backend"), GRAPHS)
def test_check_arguments_refuses_other_cuda_graphs(served, phase, backend):
    graphs = copy.deepcopy(served.cuda_graph_config)
    getattr(graphs, phase).backend = backend
    assert f"--cuda-graph-backend-{phase}" in refused(Changed(served, cuda_graph_config=graphs))


def test_check_arguments_takes_an_argument_that_sglang_does_not_have_yet_as_off(served, monkeypatch):
    monkeypatch.setitem(compat._ADDED_ARGUMENTS, "use_ray", "9.0.0")
    refusals.check_arguments(Changed(served, use_ray=True))


@pytest.mark.parametrize("variable", VARIABLES)
def test_check_arguments_refuses_variables(served, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert variable in refused(served)


def test_check_arguments_refuses_rocm(served, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in refused(served)


@pytest.mark.parametrize("size", [-1, 0, None, 128, 8192])
def test_check_arguments_takes_chunks_of_whole_pages_and_no_chunks(served, size):
    refusals.check_arguments(Changed(served, chunked_prefill_size=size))


def test_check_arguments_takes_a_pool_of_three_pages(served):
    refusals.check_arguments(Changed(served, max_total_tokens=384))


@pytest.mark.parametrize(("arguments", "flags", "drop"), DP_ATTENTION, ids=str)
def test_check_arguments_takes_dp_attention_where_it_has_run(served, monkeypatch, arguments, flags, drop):
    refusals.check_arguments(Changed(served, **arguments))
    message = refused(Changed(served, device="cuda", **arguments))
    assert message.startswith(f"{flags} cannot be combined") and "on a CPU only" in message
    assert message.endswith(f": drop {drop}, or set KVARN_UNTESTED_RANKS=1 to try it")
    monkeypatch.setenv(refusals.UNTESTED_RANKS_ENV, "1")
    refusals.check_arguments(Changed(served, device="cuda", **arguments))


def test_check_arguments_takes_the_flags_of_dp_attention_apart(served):
    # SGLang ignores the first without the second, and replicas are served
    for arguments in ({"enable_dp_attention": True}, {"dp_size": 2}):
        refusals.check_arguments(Changed(served, device="cuda", **arguments))


@pytest.mark.parametrize("ranks", [arguments for arguments, _, _ in DP_ATTENTION], ids=str)
def test_check_arguments_refuses_what_is_not_tested_beside_dp_attention(served, monkeypatch, ranks):
    for tested in ({"enable_hierarchical_cache": True}, CHAIN, {"enable_hierarchical_cache": True, **CHAIN}):
        refusals.check_arguments(Changed(served, **ranks, **tested))
    drafts = Changed(served, **ranks, speculative_algorithm="DFLASH")
    message = refused(drafts)
    assert message.startswith("--speculative-algorithm DFLASH with DP attention cannot be combined")
    drop = "drop --speculative-algorithm, or --enable-dp-attention and --attn-dp-size"
    assert "drafts of EAGLE, EAGLE3 or NEXTN only are tested" in message
    assert message.endswith(f": {drop}, or set KVARN_UNTESTED_RANKS=1 to try it")
    monkeypatch.setenv(refusals.UNTESTED_RANKS_ENV, "1")
    refusals.check_arguments(drafts)


def test_chunks_are_whole_pages_of_each_rank_with_dp_attention(server_args, model_dir):
    chosen = {"model_path": model_dir(), "kv_cache_dtype": "kvarn", **TWO_RANKS}
    server_args(**chosen, chunked_prefill_size=256).check_server_args()
    for size in (128, 384):
        with pytest.raises(Refused, match=f"among which SGLang divides it, not {size}: .* 128 times their number$"):
            server_args(**chosen, chunked_prefill_size=size)


@pytest.mark.parametrize("tested", [True, False])
def test_check_arguments_takes_a_pipeline_where_one_has_run(served, monkeypatch, tested):
    monkeypatch.setattr(compat, "runs_pipelines", lambda: tested)
    way_out = "set KVARN_UNTESTED_RANKS=1 to try it"
    if tested:
        refusals.check_arguments(Changed(served, pp_size=2))
    else:
        assert refused(Changed(served, pp_size=2)).endswith(way_out)
    monkeypatch.setenv(refusals.UNTESTED_RANKS_ENV, "1")
    refusals.check_arguments(Changed(served, pp_size=2))


@pytest.mark.parametrize(
    ("name", "value"), [("tp_size", 2), ("enable_hierarchical_cache", True), ("speculative_algorithm", "EAGLE3")]
)
def test_check_arguments_refuses_what_is_not_tested_beside_a_pipeline(served, name, value):
    message = refused(Changed(served, pp_size=2, speculative_eagle_topk=1, **{name: value}))
    option = "--" + name.replace("_", "-")
    assert message.startswith(f"--pp-size with {option}") and message.endswith(f": drop --pp-size or {option}")


@pytest.mark.parametrize(
    ("arguments", "word", "way_out"),
    [
        (
            {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 10},
            "--speculative-ngram-max-bfs-breadth 10",
            "set --speculative-ngram-max-bfs-breadth 1",
        ),
        (
            {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4},
            "--speculative-eagle-topk 4",
            "set --speculative-eagle-topk 1",
        ),
        (
            {"speculative_algorithm": "eagle", "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 127},
            "--speculative-num-draft-tokens 127",
            "set it to at most 126",
        ),
    ],
    ids=["ngram", "tree", "page"],
)
def test_check_arguments_says_which_flag_makes_a_chain_of_drafts(served, arguments, word, way_out):
    message = refused(Changed(served, **arguments))
    assert message.startswith(word) and message.endswith(f": {way_out}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_check_arguments_takes_a_chain_of_drafts(served, device):
    drafts = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}
    refusals.check_arguments(Changed(served, device=device, **drafts))


def test_check_arguments_refuses_drafts_that_are_planned_on_another_stream(served, monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "1")
    refusals.check_arguments(served)
    drafts = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
    assert "unset the variable" in refused(Changed(served, **drafts))


@pytest.mark.parametrize(("changes", "word", "way_out"), HOST_MEMORY, ids=[word for _, word, _ in HOST_MEMORY])
def test_check_arguments_says_what_is_not_served_in_host_memory(served, changes, word, way_out):
    # without host memory there is nothing to refuse
    if "device" not in changes:
        refusals.check_arguments(Changed(served, **changes))
    message = refused(Changed(served, enable_hierarchical_cache=True, **changes))
    assert message.startswith(word) and way_out in message.rpartition(": ")[2]
    assert "--kv-cache-dtype kvarn" in message


@pytest.mark.parametrize("layout", refusals.HOST_LAYOUTS)
def test_check_arguments_takes_host_memory(served, monkeypatch, layout):
    taken = {"enable_hierarchical_cache": True, "hicache_mem_layout": layout}
    refusals.check_arguments(Changed(served, **taken))
    monkeypatch.setenv(refusals.UNTESTED_HICACHE_ENV, "1")
    monkeypatch.setattr(compat, "moves_host_indices_by_pool", lambda: True)
    for device in ("cpu", "cuda"):
        for drafts in (NGRAM, CHAIN):
            refusals.check_arguments(Changed(served, device=device, **drafts, **taken))


def test_check_arguments_refuses_a_draft_model_in_host_memory_of_another_order(served, monkeypatch):
    taken = CHAIN | {"enable_hierarchical_cache": True}
    monkeypatch.setattr(compat, "moves_host_indices_by_pool", lambda: False)
    refusals.check_arguments(Changed(served, **taken, hicache_mem_layout="page_first"))
    message = refused(Changed(served, **taken, hicache_mem_layout="layer_first"))
    assert message.endswith("drop --hicache-mem-layout, or use SGLang 0.5.23")


@pytest.mark.parametrize("drafts", [{}, NGRAM, CHAIN, CHAIN | {"speculative_algorithm": "STANDALONE"}])
@pytest.mark.parametrize("storage", [None, "file"])
@pytest.mark.parametrize("is_new", [True, False])
def test_check_arguments_takes_host_memory_on_a_gpu_where_answers_were_compared(
    served, monkeypatch, drafts, storage, is_new
):
    monkeypatch.setattr(compat, "salts_storage_keys", lambda: True)
    monkeypatch.setattr(refusals, "_DRAFTS_ON_GPUS_SINCE", "0" if is_new else "99")
    args = Changed(
        served, device="cuda", enable_hierarchical_cache=True, hicache_storage_backend=storage, **drafts
    )
    if not drafts or (is_new and drafts["speculative_algorithm"] in ("NGRAM", "STANDALONE")):
        refusals.check_arguments(args)
    else:
        assert refused(args).endswith("set KVARN_UNTESTED_HICACHE=1 to try it")


@pytest.mark.parametrize(
    ("version", "fenced"), [("0.5.16", True), ("0.5.18", False), ("0.5.20", False), ("0.5.23", True)]
)
def test_check_arguments_takes_host_memory_where_copies_wait(served, monkeypatch, version, fenced):
    monkeypatch.setattr(compat, "version", lambda: version)
    assert compat.fences_host_copies() is fenced
    monkeypatch.undo()
    monkeypatch.setattr(compat, "fences_host_copies", lambda: fenced)
    args = Changed(served, enable_hierarchical_cache=True)
    if fenced:
        refusals.check_arguments(args)
    else:
        assert refused(args).endswith(": drop --enable-hierarchical-cache, or use SGLang 0.5.23")


def test_check_arguments_takes_files_behind_host_memory_where_keys_are_salted(served, monkeypatch):
    args = Changed(served, enable_hierarchical_cache=True, hicache_storage_backend="file")
    monkeypatch.setattr(compat, "salts_storage_keys", lambda: True)
    refusals.check_arguments(args)
    for drafts in (NGRAM, CHAIN):
        refusals.check_arguments(Changed(args, **drafts))
    monkeypatch.setattr(compat, "salts_storage_keys", lambda: False)
    assert refused(args).endswith(": drop --hicache-storage-backend, or use SGLang 0.5.23")


@pytest.mark.parametrize(
    ("mode", "device", "storage", "salted", "states", "windows", "end"),
    [
        ("null", "cpu", "file", True, None, False, None),
        ("null", "cuda", "file", True, None, False, None),
        ("null", "cpu", "mooncake", True, None, False, "because only files are tested: attach file"),
        ("null", "cpu", "dynamic", True, None, False, "because only files are tested: attach file"),
        ("null", "cpu", "file", False, None, False, "so that tenants would share pages: use SGLang 0.5.23"),
        ("null", "cuda", "mooncake", False, None, False, "so that tenants would share pages: use SGLang 0.5.23"),
        ("null", "cpu", "file", True, object(), False, None),
        ("prefill", "cpu", "file", True, None, False, "beside transfers between servers: keep prefixes in memory"),
        ("null", "cpu", "file", True, None, True, None),
        ("null", "cuda", "file", True, None, True, "or start the server with KVARN_UNTESTED_WINDOWS=1 to try it"),
    ],
)
def test_a_running_server_attaches_what_it_could_start_with(
    monkeypatch, mode, device, storage, salted, states, windows, end
):
    published = {"device": device, "disaggregation_mode": mode}
    monkeypatch.setattr(compat, "published_argument", published.__getitem__)
    monkeypatch.setattr(compat, "salts_storage_keys", lambda: salted)
    monkeypatch.setattr(compat, "hybrid_config", lambda model_config: states)
    monkeypatch.setattr(compat, "windows_in_records", lambda model_config: windows)
    model_config = SimpleNamespace(is_hybrid_swa=False)
    args = SimpleNamespace(kv_cache_dtype="kvarn", model_path="model", served_model_name=None)
    scheduler = SimpleNamespace(server_args=args, model_config=model_config)
    request = SimpleNamespace(hicache_storage_backend=storage)
    attached = []
    answer = refusals.attach_or_refuse(lambda *given: attached.append(given), scheduler, request)
    assert attached == ([(scheduler, request)] if end is None else [])
    if end is not None:
        start = f"The storage backend {storage} cannot be combined with --kv-cache-dtype kvarn, "
        assert not answer.success and answer.message.startswith(start) and answer.message.endswith(end)


@pytest.mark.skipif(not compat.salts_storage_keys(), reason="files are refused with this version of SGLang")
def test_files_want_a_model_by_whose_name_they_can_be_called(served):
    # what the preset kvarn is called in their names
    longest = storage_keys.longest_model_name("kvarn_k4v2_g128")
    hosted = {"enable_hierarchical_cache": True, "hicache_storage_backend": "file"}
    refusals.check_arguments(Changed(served, **hosted, served_model_name="m" * longest))
    message = refused(Changed(served, **hosted, served_model_name="m" * (longest + 1)))
    assert message.startswith("--hicache-storage-backend file cannot be combined")
    assert message.endswith(": give the model a shorter name by --served-model-name")
    # bytes count
    assert "longer than 255 bytes" in refused(Changed(served, **hosted, served_model_name="\u00e9" * longest))
    args = SimpleNamespace(kv_cache_dtype="kvarn", served_model_name=None, model_path="m" * (longest + 1))
    request = SimpleNamespace(hicache_storage_backend="file")
    answer = refusals.attach_or_refuse(None, SimpleNamespace(server_args=args), request)
    assert not answer.success and answer.message.endswith("start the server with a shorter --served-model-name")


needs_transfers = pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang")


@needs_transfers
@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(("changes", "way_out"), TRANSFER, ids=[next(iter(changes)) for changes, _ in TRANSFER])
def test_check_arguments_says_what_is_not_served_between_servers(served, monkeypatch, mode, changes, way_out):
    # without another server there is nothing to refuse
    monkeypatch.setattr(compat, "runs_pipelines", lambda: True)
    refusals.check_arguments(Changed(served, **changes))
    message = refused(Changed(served, disaggregation_mode=mode, **changes))
    name, _ = next(iter(changes.items()))
    assert message.startswith(f"--{name.replace('_', '-')}") and way_out in message.rpartition(": ")[2]
    assert "--kv-cache-dtype kvarn" in message


@needs_transfers
@pytest.mark.parametrize(("variable", "value"), TRANSFER_VARIABLES.items())
def test_check_arguments_refuses_variables_of_transfers(served, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    refusals.check_arguments(served)
    message = refused(Changed(served, disaggregation_mode="decode"))
    assert message.startswith(variable) and message.endswith(": unset the variable")


@needs_transfers
@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_check_arguments_takes_transfers(served, mode, device):
    refusals.check_arguments(Changed(served, disaggregation_mode=mode, device=device))
    refusals.check_arguments(Changed(served, disaggregation_mode=mode, tp_size=2, device=device))


@needs_transfers
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_check_arguments_takes_drafts_between_servers_on_a_cpu(served, monkeypatch, mode):
    chain = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1}
    refusals.check_arguments(Changed(served, disaggregation_mode=mode, **chain))
    on_gpu = Changed(served, device="cuda", disaggregation_mode=mode, **chain)
    assert refused(on_gpu).endswith("drop --speculative-algorithm, or set KVARN_UNTESTED_TRANSFERS=1 to try it")
    monkeypatch.setenv(refusals.UNTESTED_TRANSFERS_ENV, "1")
    refusals.check_arguments(on_gpu)


@needs_transfers
@pytest.mark.parametrize("replicas", [{"enable_dp_attention": True, "dp_size": 2}, {"attn_dp_size": 2}], ids=str)
def test_check_arguments_refuses_dp_attention_between_servers(served, monkeypatch, replicas):
    monkeypatch.setenv(refusals.UNTESTED_RANKS_ENV, "1")
    message = refused(Changed(served, disaggregation_mode="decode", **replicas))
    assert message.endswith(": drop --enable-dp-attention and --attn-dp-size")


@needs_transfers
def test_check_arguments_takes_host_memory_of_a_server_for_prompts(served, monkeypatch):
    hosted = {"enable_hierarchical_cache": True}
    refusals.check_arguments(Changed(served, disaggregation_mode="prefill", **hosted))
    message = refused(Changed(served, disaggregation_mode="decode", **hosted))
    assert message.endswith("drop --enable-hierarchical-cache; a server for prompts takes it")
    on_gpu = Changed(served, device="cuda", disaggregation_mode="prefill", **hosted)
    assert refused(on_gpu).endswith("set KVARN_UNTESTED_HICACHE=1 to try it")
    monkeypatch.setenv(refusals.UNTESTED_HICACHE_ENV, "1")
    refusals.check_arguments(on_gpu)


def test_check_arguments_takes_transfers_with_one_version_of_sglang(served, monkeypatch):
    monkeypatch.setattr(compat, "transfers_requests", lambda: False)
    message = refused(Changed(served, disaggregation_mode="prefill"))
    assert message.startswith("--disaggregation-mode prefill") and "use SGLang 0.5.23" in message


def test_every_refusal_of_the_table_has_a_case():
    # prefill and decode backend are one refusal; two for graphs, five for drafts, seven for host memory (the version,
    # its order with a draft model, storage, names of files; drafts of either kind and PD on a GPU); four for the
    # version, host memory, drafts on a GPU and DP attention beside transfers; four for pipelines; four for DP attention
    # (two on a GPU, the chunk of a rank, drafts beside it)
    cases = len(CASES) - 1 + len(VARIABLES) + len(HOST_MEMORY) + 14 + (not compat.has_argument(HOST_MODE))
    cases += len(TRANSFER) + len(TRANSFER_VARIABLES) + 4 + 4 + 4
    assert len(refusals.ARGUMENTS) == cases


@pytest.mark.parametrize(
    ("chosen", "word"),
    [
        ({"page_size": 64}, "--page-size"),
        ({"attention_backend": "torch_native"}, "--attention-backend"),
        ({"decode_attention_backend": "torch_native"}, "--decode-attention-backend"),
        ({"enable_memory_saver": True}, "--enable-memory-saver"),
        ({"pp_size": 2, "disable_overlap_schedule": True, "enable_hierarchical_cache": True}, "--pp-size"),
    ],
    ids=str,
)
def test_server_args_are_refused_in_the_parent(server_args, model_dir, chosen, word):
    with pytest.raises(Refused, match=word):
        server_args(model_path=model_dir(), kv_cache_dtype="kvarn", **chosen)


@pytest.mark.parametrize(
    ("chosen", "word"),
    [
        ({"speculative_algorithm": "NGRAM"}, "set --speculative-ngram-max-bfs-breadth 1"),
        ({"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 2}, "set --speculative-eagle-topk 1"),
        ({"speculative_algorithm": "UNO"}, "set it to NGRAM, STANDALONE, EAGLE, EAGLE3, NEXTN or DFLASH"),
        ({"enable_deterministic_inference": True}, "drop --enable-deterministic-inference"),
        ({"rl_on_policy_target": "fsdp"}, "drop --rl-on-policy-target"),
        ({"chunked_prefill_size": 100}, "not 100: set it to a multiple of 128"),
        ({"max_total_tokens": 100}, "raise --max-total-tokens"),
        ({"attention_backend": "kvarn", "kv_cache_dtype": "auto"}, "add --kv-cache-dtype kvarn"),
    ],
    ids=str,
)
def test_resolution_refuses_what_sglang_would_advise_on_otherwise(server_args, model_dir, chosen, word):
    with pytest.raises(Refused, match=word):
        server_args(**({"model_path": model_dir(), "kv_cache_dtype": "kvarn"} | chosen))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"head_dim": 96}, "head_dim 96"),
        ({"v_head_dim": 128}, "values of 128 and keys of 64"),
        ({"attention_chunk_size": 1024}, "chunked attention"),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "model_type": "gemma2",
                "sliding_window": 512,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "sliding-window",
        ),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 64,
                "qk_rope_head_dim": 32,
                "qk_nope_head_dim": 32,
                "v_head_dim": 64,
                "q_lora_rank": None,
            },
            "latent attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_are_refused_in_the_parent(server_args, model_dir, changes, word):
    args = server_args(model_path=model_dir(**changes), kv_cache_dtype="kvarn")
    with pytest.raises(ValueError, match=word):
        args.check_server_args()


def model_of_heads(query_heads: int | list[int], kv_heads: int) -> SimpleNamespace:
    """Return what `check_ranks` reads of a model, whose layers may have different numbers of query heads."""
    each = query_heads if isinstance(query_heads, list) else None
    return SimpleNamespace(
        num_attention_heads=each[0] if each else query_heads,
        hf_text_config=SimpleNamespace(num_attention_heads_per_layer=each),
        get_total_num_kv_heads=lambda: kv_heads,
    )


@pytest.mark.parametrize(
    ("device", "tp_size", "heads", "sizes"),
    [
        ("cpu", 2, (6, 3), "1 or 3"),
        ("cpu", 2, (4, 1), "1"),
        ("cuda", 2, (6, 3), "1 or 3"),
        # query heads are never replicated
        ("cuda", 3, (8, 1), "1"),
        ("cuda", 4, (6, 2), "1 or 2"),
        # the layers that have other ones keep sliding windows
        ("cuda", 4, ([8, 6, 8], 4), "1 or 2"),
    ],
)
def test_check_ranks_names_the_heads_and_the_sizes_that_fit(device, tp_size, heads, sizes):
    with pytest.raises(Refused) as error:
        refusals.check_ranks(tp_size, model_of_heads(*heads), on_cpu=device == "cpu")
    found = "6 or 8" if isinstance(heads[0], list) else heads[0]
    assert f"--tp-size {tp_size} cannot share the {found} query heads and {heads[1]} KV heads" in str(error.value)
    assert str(error.value).endswith(f": set --tp-size to {sizes}")
    assert (" on a CPU" in str(error.value)) == (device == "cpu")


@pytest.mark.parametrize(
    ("device", "tp_size", "heads"),
    [
        *[("cpu", 2, (4, 2)), ("cpu", 1, (5, 3)), ("cuda", 2, (4, 2)), ("cuda", 4, (8, 2)), ("cuda", 8, (8, 1))],
        ("cuda", 2, ([8, 6, 8], 4)),
    ],
)
def test_check_ranks_takes_ranks_that_share_or_repeat_kv_heads(device, tp_size, heads):
    refusals.check_ranks(tp_size, model_of_heads(*heads), on_cpu=device == "cpu")


@pytest.mark.parametrize("ranks", [{}, {"enable_dp_attention": True, "dp_size": 2}], ids=["shared", "DP attention"])
def test_ranks_that_do_not_fit_the_heads_are_refused_in_the_parent(server_args, model_dir, ranks):
    # on a CPU SGLang makes up heads also where each rank has all of them
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 384}
    args = server_args(model_path=model_dir(**heads), kv_cache_dtype="kvarn", tp_size=2, **ranks)
    with pytest.raises(Refused, match="set --tp-size to 1 or 3"):
        args.check_server_args()


@pytest.fixture
def ranks(monkeypatch):
    """What SGLang says of the ranks of a scheduler: one, with all requests."""
    found = SimpleNamespace(attn_dp_size=1)
    monkeypatch.setattr(compat, "get_parallel", lambda: found, raising=False)
    return found


SHAPE = AttentionShape(num_qo_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float32)


class Layers(torch.nn.Module):
    """A model with one attention layer."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        defaults = {"num_heads": 4, "head_dim": 64, "scaling": 0.125, "num_kv_heads": 2, "layer_id": 0}
        self.attn = compat.RadixAttention(**(defaults | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"logit_cap": 50.0}, "logit cap of 50"),
        ({"sliding_window_size": 512}, "sliding window of 513 tokens"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": compat.AttentionType.ENCODER_ONLY}, "encoder_only"),
        ({"head_dim": 80}, "head_dim 80"),
        ({"v_head_dim": 128}, "different width"),
    ],
    ids=str,
)
def test_check_layers_names_the_property(ranks, kwargs, word):
    refusals.check_layers(Layers(), [0], SHAPE)
    with pytest.raises(ValueError, match=f"Layers has .*{word}"):
        refusals.check_layers(Layers(**kwargs), [0], SHAPE)
    # of layers with a sliding window those that steps are planned for are attended
    if "sliding_window_size" in kwargs:
        refusals.check_layers(Layers(**kwargs), [0], SHAPE, (513,))
        with pytest.raises(ValueError, match=word):
            refusals.check_layers(Layers(**kwargs), [0], SHAPE, (512,))
    # SGLang's own backend attends the other layers
    refusals.check_layers(Layers(**kwargs), [1], SHAPE)


def test_check_layers_refuses_models_whose_heads_all_ranks_share_beside_dp_attention(ranks):
    shared = Layers(num_heads=2, num_kv_heads=1)
    with pytest.raises(Refused, match="layers of another shape"):
        refusals.check_layers(shared, [0], SHAPE)
    ranks.attn_dp_size = 2
    refusals.check_layers(Layers(), [0], SHAPE)
    with pytest.raises(Refused, match=r"^DP attention .* Layers .* whatever the cache: drop --enable-dp-attention and"):
        refusals.check_layers(shared, [0], SHAPE)


def test_draft_models_whose_heads_all_ranks_share_are_refused_beside_dp_attention(ranks):
    draft, shared, ranks.attn_tp_size = SimpleNamespace(num_attention_heads=8), Layers(num_heads=2, num_kv_heads=1), 2
    refusals.check_draft_model(shared, draft)
    ranks.attn_dp_size = 2
    refusals.check_draft_model(Layers(), draft)
    with pytest.raises(Refused, match=r"^DP attention .* Layers .* whatever the cache: drop --enable-dp-attention and"):
        refusals.check_draft_model(shared, draft)


def test_check_layers_refuses_layers_of_another_shape(ranks):
    layers = torch.nn.ModuleList([Layers(), Layers(layer_id=1), Layers(layer_id=2, num_heads=8)])
    refusals.check_layers(layers, [0, 1], SHAPE)
    with pytest.raises(ValueError, match="layers of another shape"):
        refusals.check_layers(layers, [0, 1, 2], SHAPE)


def test_check_call_refuses_shared_caches_and_sinks():
    k = torch.zeros(1)
    refusals.check_call(k, True, {"sinks": None})
    with pytest.raises(ValueError, match="share"):
        refusals.check_call(k, False, {})
    with pytest.raises(ValueError, match="share"):
        refusals.check_call(None, True, {})
    with pytest.raises(ValueError, match="got sinks"):
        refusals.check_call(k, True, {"sinks": k})


def test_check_device_asks_for_16_bit_on_a_gpu(monkeypatch):
    refusals.check_device("cpu", torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    refusals.check_device("cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        refusals.check_device("cuda", torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match=r"8\.0 or later, not Tesla T4"):
        refusals.check_device("cuda", torch.float16)


@pytest.mark.parametrize(
    ("name", "capability", "is_refused"),
    [("Qwen3NextConfig", (10, 0), True), ("Qwen3NextConfig", (9, 0), False), ("NemotronHConfig", (10, 0), False)],
)
def test_gated_delta_nets_are_refused_where_sglang_wants_attention_of_its_own(
    monkeypatch, name, capability, is_refused
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(compat, "hybrid_config", lambda model: type(name, (), {})())
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Any"]))
    refusals.check_states_on_device("cpu", model)
    with pytest.raises(ValueError, match="Any on a GPU") if is_refused else contextlib.nullcontext():
        refusals.check_states_on_device("cuda", model)


def test_pool_refuses_foreign_readers_and_writers():
    from sglang_kvarn.pool import KVarNTokenToKVPool

    pool = SimpleNamespace()
    for name in ("set_kv_buffer", "get_key_buffer", "get_value_buffer", "get_kv_buffer"):
        arguments = (0,) if name != "set_kv_buffer" else ()
        with pytest.raises(ValueError, match="expected the kvarn attention backend"):
            getattr(KVarNTokenToKVPool, name)(pool, *arguments)
