# SPDX-License-Identifier: Apache-2.0
"""Bugs of requests that go from one server to another. Their tests need an SGLang whose transfer is hooked."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ADMISSION,
    BUDGET,
    COMPAT,
    FENCES,
    MIXED_POOL,
    PLUGIN,
    POOL,
    REFUSALS,
    RINGS,
    SETTINGS,
    TEST_BUDGET,
    TEST_MODELS,
    TEST_SETTINGS,
    TEST_TRANSFER,
    TRANSFER,
)

_START = f"{TEST_TRANSFER}::test_the_exact_start_travels_with_the_first_token_and_reaches_the_row"
_RING = f"{TEST_TRANSFER}::test_the_pages_of_a_ring_that_are_sent_are_those_that_the_next_token_reads"
_RETRACTED = f"{TEST_TRANSFER}::test_a_retracted_request_comes_back_with_records_ring_and_exact_start"
_ROOM = f"{TEST_TRANSFER}::test_a_request_is_received_where_there_is_room_for_its_ring_too"
_DESCRIBE = f"{TEST_TRANSFER}::test_describe_names_records_by_layer_and_rings_as_a_state"
_LAYOUT = f"{TEST_TRANSFER}::test_the_layout_holds_what_every_rank_says_of_its_channels"
_DRAFTS = "tests/engine/test_disaggregation_drafts.py"
_DRAFTED = f"{_DRAFTS}::test_answers_are_the_oracles_whether_drafts_are_rejected_or_accepted"
_STATES = f"{TEST_TRANSFER}::test_the_layout_names_the_dtypes_of_states_and_sglang_sends_their_slots"
_ROWS = f"{TEST_TRANSFER}::test_rows_of_a_decode_server_have_rings"
_OTHER = f"{TEST_TRANSFER}::test_pages_of_a_server_with_another_layout_fail_the_request_with_one_sentence"
_WINDOWS = f"{TEST_TRANSFER}::test_sglang_sends_windows_beside_records_and_rings"
_SENDERS = f"{TEST_TRANSFER}::test_a_server_that_tells_no_layout_is_another"
_FENCE = f"{TEST_TRANSFER}::test_a_sender_hears_of_pages_after_the_steps_of_their_last_owner"
_SHARE = f"{TEST_BUDGET}::test_sliding_share_reads_shapes_and_arguments_of_a_server"
_COUNTED = "test_sglang_counts_a_ring_beside_the_tokens_of_a_request_that_comes_or_comes_back"
# what hooks call, and the test that is to miss it
_CALLED = {
    "transfer.send_exact_start": "test_the_exact_start_is_in_its_place_before_sglang_sends_the_first_token",
    "transfer.take_exact_start": "test_the_exact_start_is_taken_before_sglang_takes_the_first_token",
    "fences.before_receiving": "test_sglang_waits_for_steps_before_it_tells_a_sender_of_pages",
    "transfer.charge_ring": _COUNTED,
    "transfer.charge_ring_of_retracted": _COUNTED,
    "transfer.finish_step": "test_the_last_step_of_a_request_with_a_state_ends_before_the_request_is_taken_back",
}
_PAGES = f"{TEST_TRANSFER}::test_a_step_that_may_take_so_many_pages_waits_for_the_last_one"
_STEP = f"{TEST_TRANSFER}::{_CALLED['transfer.finish_step']}"
_STEP_OF_TEST = f"{TEST_TRANSFER}::test_the_last_step_ends_before_a_request_is_taken_back_for_a_test"
_OVERLAP = f"{TEST_TRANSFER}::test_steps_overlap_where_no_state_is_taken_back"

MUTATIONS = (
    *(
        Mutation(
            f"{name} that no hook calls",
            PLUGIN,
            f"            {name},\n",
            "            lambda *args, **kwargs: None,\n",
            (f"{TEST_TRANSFER}::{test}",),
        )
        for name, test in _CALLED.items()
    ),
    Mutation(
        "an exact start that is sent before it counts, and not with the first token",
        TRANSFER,
        "if last_chunk and (found",
        "if not last_chunk and (found",
        (_START,),
    ),
    Mutation(
        "a received request that reads its ring from the first token on",
        TRANSFER,
        "compat.request_row(decode_req.req), int(numbers[EXACT_START])",
        "compat.request_row(decode_req.req), 0",
        (_START,),
    ),
    Mutation(
        "a request without a sender that gets the exact start of another",
        TRANSFER,
        "        numbers[EXACT_START] = 0\n",
        "",
        (_START,),
    ),
    Mutation(
        "an exact start in the place of a number of SGLang's",
        TRANSFER,
        "EXACT_START = 15",
        "EXACT_START = 3",
        (f"{TEST_TRANSFER}::test_sglang_leaves_the_number_of_the_exact_start_alone",),
    ),
    Mutation(
        "a transfer of the query's own page without the window before it",
        POOL,
        "max(tokens // PAGE_SIZE - self.config.window_pages, 0)",
        "max(tokens // PAGE_SIZE, 0)",
        (_RING,),
    ),
    Mutation(
        "pages of a ring in the order of their ids, which differs between servers",
        POOL,
        "return list(dict.fromkeys(held[n % len(held)] for n in range(first // each, -(-tokens // each))))",
        "return sorted({held[n % len(held)] for n in range(first // each, -(-tokens // each))})",
        (_RING,),
    ),
    Mutation(
        "a ring without its newest page",
        POOL,
        "range(first // each, -(-tokens // each))",
        "range(first // each, tokens // each)",
        (_RING,),
    ),
    Mutation(
        "a request that is received without room for its ring",
        TRANSFER,
        "else result + found.tokens_per_ring",
        "else result",
        (_ROOM,),
    ),
    Mutation(
        "a retracted request that comes back without room for its ring",
        TRANSFER,
        "return full + found.tokens_per_ring, windows",
        "return full, windows",
        (_ROOM,),
    ),
    Mutation(
        "a retracted request that forgets its exact start",
        POOL,
        "        self.rings.set_exact_start(req_pool_index, saved.exact_start)\n",
        "",
        (_RETRACTED,),
    ),
    Mutation(
        "a retracted request that comes back without its exact tokens",
        POOL,
        "        self.slab[:, ring] = saved.ring.to(self.slab.device)\n",
        "",
        (_RETRACTED,),
    ),
    Mutation(
        "exact starts that the device does not see",
        RINGS,
        "        self._write_starts([row], [start])\n",
        "",
        (_RETRACTED, _START),
    ),
    Mutation(
        "a retracted request whose ring SGLang does not keep",
        SETTINGS,
        'server_args.disaggregation_decode_retraction_backup = "cpu_tensor"',
        "pass",
        (f"{TEST_SETTINGS}::test_a_decode_server_keeps_retracted_requests_with_their_rings",),
    ),
    Mutation(
        "a sender that may write where a step still does",
        FENCES,
        "        records.forward_stream.synchronize()\n",
        "        pass\n",
        (f"{TEST_TRANSFER}::test_a_sender_hears_of_pages_after_the_steps_of_their_last_owner",),
    ),
    Mutation(
        "a decode server that takes a prompt for which there is never room",
        ADMISSION,
        "min(scheduler.max_req_input_len, longest - reserved)",
        "min(scheduler.max_req_input_len, longest)",
        (f"{TEST_TRANSFER}::test_a_decode_server_takes_no_prompt_that_never_fits_beside_what_it_reserves",),
    ),
    Mutation(
        "records that are paired as keys and values",
        TRANSFER,
        "    kv_args.kv_layer_ids = [*pool.layer_ids, *range(after, after + len(draft_pages))]\n",
        "    kv_args.kv_layer_ids = []\n",
        (_DESCRIBE,),
    ),
    Mutation(
        "pages of a draft model without a place on the other server",
        TRANSFER,
        "[*pool.layer_ids, *range(after, after + len(draft_pages))]",
        "list(pool.layer_ids)",
        (_DESCRIBE, _DRAFTED),
    ),
    Mutation(
        "pages of a draft model that are not compared",
        TRANSFER,
        """"draft_page_bytes": draft_pages,""",
        """"draft_page_bytes": [],""",
        (_LAYOUT, _DESCRIBE),
    ),
    Mutation(
        "rings of other lengths that are not compared",
        TRANSFER,
        """"ring_pages": pool.rings.pages_per_ring,""",
        """"ring_pages": 0,""",
        (_LAYOUT,),
    ),
    Mutation(
        "a decode server that lets SGLang compare, and end it",
        TRANSFER,
        """published_argument("disaggregation_mode") == "prefill":""",
        """published_argument("disaggregation_mode") != "null":""",
        (_DESCRIBE,),
    ),
    Mutation(
        "balanced heads of one rank only that are compared",
        TRANSFER,
        """"-".join(compat.gather_from_ranks(pool.balance_tag()))""",
        "pool.balance_tag()",
        (_LAYOUT,),
    ),
    Mutation("ranks that are not compared", TRANSFER, """"tp_size": ranks,""", """"tp_size": 1,""", (_LAYOUT,)),
    Mutation(
        "a server that tells nothing of its pages and is believed",
        TRANSFER,
        "if sender.get(part) != mine[part]:",
        "if sender.get(part, mine[part]) != mine[part]:",
        (f"{TEST_TRANSFER}::test_a_server_that_tells_no_layout_is_another",),
    ),
    Mutation(
        "a balance of channels that is not compared",
        TRANSFER,
        """    "balance": "start both servers with the same weights and the same KVARN_BALANCE",\n""",
        "",
        (_OTHER,),
    ),
    Mutation(
        "another server whose second request is received",
        TRANSFER,
        "            del queue.kv_manager.prefill_info_table[address]\n",
        "",
        (_OTHER,),
    ),
    Mutation(
        "a sender that waits for a request which has failed",
        COMPAT,
        "    receiver.ensure_abort_notified()\n",
        "",
        (_OTHER,),
    ),
    Mutation(
        "a server that ends because of another one's cache",
        TRANSFER,
        "except RuntimeError as error:",
        "except KeyError as error:",
        (f"{TEST_TRANSFER}::test_what_sglang_finds_different_fails_the_request_and_not_the_server",),
    ),
    Mutation(
        "a server with other ranks that is told to balance its channels",
        TRANSFER,
        "in _WAYS_OUT.items():",
        "in sorted(_WAYS_OUT.items()):",
        (f"{TEST_TRANSFER}::test_other_ranks_are_named_although_their_balance_differs_too",),
    ),
    Mutation(
        "a request whose client is gone that ends the server",
        TRANSFER,
        "        if request.kv_receiver is None:\n            continue\n",
        "",
        (f"{TEST_TRANSFER}::test_a_request_whose_client_is_gone_does_not_keep_the_others_from_failing",),
    ),
    Mutation(
        "a failed request that SGLang waits for",
        COMPAT,
        "    receiver.kv_mgr.update_status(receiver.bootstrap_room, failed)\n",
        "",
        (_OTHER,),
    ),
    Mutation(
        "states of other dtypes that are not compared",
        TRANSFER,
        """    "states": "start both servers with the same --mamba-ssm-dtype and SGLANG_MAMBA_CONV_DTYPE",\n""",
        "",
        (_OTHER,),
    ),
    Mutation(
        "a layout that says nothing of states",
        TRANSFER,
        """        "states": states,\n""",
        """        "states": None,\n""",
        (_LAYOUT, _STATES),
    ),
    Mutation(
        "states that convolutions keep in another dtype",
        COMPAT,
        "for each in (kept.temporal, *kept.conv)]",
        "for each in (kept.temporal, kept.temporal)]",
        (_STATES,),
    ),
    Mutation(
        "rows with states whose rings outlive a flush",
        PLUGIN,
        "for rows in (_ROWS, _ROWS_WITH_STATES)",
        "for rows in (_ROWS,)",
        (_ROWS,),
    ),
    Mutation(
        "a state that moves on by the token of a step whose request was taken back",
        TRANSFER,
        "        compat.finish_step(scheduler)\n",
        "        pass\n",
        (_STEP, _STEP_OF_TEST),
    ),
    Mutation(
        "a result that is taken twice",
        COMPAT,
        "    scheduler.process_batch_result(*scheduler.result_queue.popleft())\n    scheduler.last_batch = None\n",
        "    scheduler.process_batch_result(*scheduler.result_queue.popleft())\n",
        (_STEP,),
    ),
    Mutation(
        "states of requests that are taken back for a test",
        COMPAT,
        "return is_tested or scheduler",
        "return scheduler",
        (_STEP_OF_TEST,),
    ),
    Mutation(
        "steps that never overlap beside states",
        TRANSFER,
        "    if compat.may_retract(scheduler, running_batch, tokens):\n",
        "    if True:\n",
        (_PAGES,),
    ),
    Mutation(
        "steps that overlap until a request that was received has no room",
        COMPAT,
        "running_batch.batch_size() + len(scheduler.waiting_queue)",
        "running_batch.batch_size()",
        (_STEP,),
    ),
    Mutation(
        "steps that overlap until drafts have no room",
        TRANSFER,
        "(2 + 2 * pool.draft_tokens // PAGE_SIZE) * PAGE_SIZE",
        "2 * PAGE_SIZE",
        (_PAGES,),
    ),
    Mutation(
        "steps that end for tokens, which are written again as they were",
        TRANSFER,
        "or pool.states is None or not",
        "or not",
        (_OVERLAP,),
    ),
    Mutation(
        "fewer states than a decode server has",
        BUDGET,
        "number = made or compat",
        "number = compat",
        (f"{TEST_BUDGET}::test_no_more_requests_are_charged_than_states_allow",),
    ),
    Mutation(
        "transfers of states on a GPU that nobody has tried",
        REFUSALS,
        """if args.disaggregation_mode != "null" and _is_trial(args.device, UNTESTED_TRANSFERS_ENV):""",
        "if False:",
        (f"{TEST_MODELS}::test_transfers_of_states_are_a_trial_on_a_gpu",),
    ),
    Mutation(
        "transfers of windows on a GPU that nobody has tried",
        REFUSALS,
        """    _check_transfers_beside(args, model, "sliding windows")\n""",
        "",
        (f"{TEST_MODELS}::test_some_draft_models_beside_sliding_windows_are_refused_and_a_gpu_is_a_trial",),
    ),
    Mutation(
        "records beside windows that no transfer finds",
        RINGS,
        """records = getattr(pool, "full_kv_pool", pool)""",
        "records = pool",
        (_WINDOWS, _SENDERS, _FENCE),
    ),
    Mutation(
        "pages of rings beside windows that a sender is told of while a step may write them",
        FENCES,
        "records = rings.records_of(queue.token_to_kv_pool)",
        "records = queue.token_to_kv_pool if rings.of_pool(queue.token_to_kv_pool) else None",
        (_FENCE,),
    ),
    Mutation(
        "exact tokens beside windows that stay where they are",
        MIXED_POOL,
        "return self.full_kv_pool.request_state_transfer_indices(row, tokens)",
        "return []",
        (_WINDOWS,),
    ),
    Mutation(
        "a decode server without room for windows of requests that it receives",
        BUDGET,
        "requests + compat.received_requests(server_args), ",
        "requests, ",
        (_SHARE,),
    ),
    Mutation(
        "windows that are too few for SGLang to receive a request",
        BUDGET,
        ", compat.most_new_tokens_expected()",
        ", 0",
        (_SHARE,),
    ),
)
