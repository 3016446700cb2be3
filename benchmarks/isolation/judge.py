# SPDX-License-Identifier: Apache-2.0
"""Judge the answers of a load: who differs from the answer alone, who holds another tenant's secret, who hung."""

from __future__ import annotations

from statistics import median, quantiles

from benchmarks.isolation.load import Answer
from benchmarks.isolation.oracle import NEAR_TIE, Oracle
from benchmarks.isolation.tenants import contains


def judge(oracle: Oracle, answers: list[Answer]) -> dict:
    """Compare every answer, also the part that a dropped client read, with the answer alone."""
    prompts = oracle.prompts
    secrets = {prompt.tenant: prompt.secret for prompt in prompts}
    differing, near_ties, leaks, hung = [], [], [], []
    for n, answer in enumerate(answers):
        ids = answer.output_ids
        complete = answer.kind != "plain" or len(ids) == answer.new_tokens
        if answer.error or not complete:
            hung.append(f"{n}: {answer.error or f'{len(ids)} of {answer.new_tokens} tokens'}")
        first, margin = oracle.compare(answer)
        if first is not None:
            where = {"prompt": answer.prompt, "kind": answer.kind, "first": first, "margin": round(margin, 4)}
            (differing if margin >= NEAR_TIE else near_ties).append(where)
        mine = prompts[answer.prompt].tenant
        if answer.output:
            leaks += [(n, t) for t, secret in secrets.items() if t != mine and contains(answer.output, secret)]
    meta = [a.output["meta_info"] for a in answers if a.output]
    plain = sorted(a.seconds for a in answers if a.kind == "plain" and not a.error)
    return {
        "requests": len(answers),
        "plain": len(plain),
        "disconnected": sum(a.kind == "disconnect" for a in answers),
        "aborted": sum(a.kind == "abort" for a in answers),
        "tokens": sum(len(a.output_ids) for a in answers),
        "prefix hits": sum(m.get("cached_tokens", 0) > 0 for m in meta),
        "hits in host memory": sum((m.get("cached_tokens_details") or {}).get("host", 0) > 0 for m in meta),
        "hits in files": sum((m.get("cached_tokens_details") or {}).get("storage", 0) > 0 for m in meta),
        "cached tokens": sum(m.get("cached_tokens", 0) for m in meta),
        "retractions": sum(m.get("num_retractions", 0) for m in meta),
        "seconds p50": round(median(plain), 2) if plain else None,
        "seconds p95": round(quantiles(plain, n=20)[-1], 2) if len(plain) > 1 else None,
        "seconds max": round(plain[-1], 2) if plain else None,
        "differing at a near tie": len(near_ties),
        "near ties": near_ties[:20],
        "differing": len(differing),
        "differing answers": differing[:20],
        "differing prompts": len({where["prompt"] for where in differing + near_ties}),
        "leaked secrets": len(leaks),
        "leaks": leaks[:20],
        "failed": len(hung),
        "failures": hung[:20],
    }
