"""Token shares, rendering, packing, tokenizer, and the lean forward pass."""

from __future__ import annotations

import random

import pytest
import torch

from reftune.nano import mix, packing
from reftune.nano.forward import logits
from reftune.nano.item import Item
from reftune.nano.shapes import build_model
from reftune.nano.tokenizer import (
    ASSISTANT_ID,
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SPECIAL,
    USER_ID,
    VOCABULARY,
    load_tokenizer,
    train_tokenizer,
)

ITEM = Item("sums", "drill", (), "What is 47 + 38?", "47 + 38 = 85. The answer is 85.", "85")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_tokenizer_has_six_special_tokens_first(tokenizer) -> None:
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (PAD_ID, BOS_ID, EOS_ID) and tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    "text",
    [
        "It costs $3.50 – naïve café 日本",
        "a\n\tb  c",
        "def f(x):\n    return {'a': x}",
        "\x00\x7f\u200b",
    ],
)
def test_tokenizer_loses_nothing(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_digits_are_single(tokenizer) -> None:
    multiple = [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) > 1]
    assert not multiple
    assert tokenizer.tokenize("12345") == list("12345")


def test_prompt_gets_one_bos(tokenizer) -> None:
    ids = tokenizer("Question: Who? Answer:")["input_ids"]
    assert ids[0] == BOS_ID and BOS_ID not in ids[1:] and EOS_ID not in ids


def test_tokenizer_training_repeats() -> None:
    texts = [f"the {word} is {word}" for word in ("house", "mouse", "horse")] * 5
    first, second = (train_tokenizer(iter(texts), 300).get_vocab() for _ in range(2))
    assert first == second and len(first) <= 300


def test_native_rendering_joins_prompt_and_completion(tokenizer) -> None:
    ids, weights = mix.render(ITEM, tokenizer)
    prompt = tokenizer(mix.prompt_text(ITEM))["input_ids"]
    assert ids[: len(prompt)] == prompt and ids[-1] == EOS_ID
    assert tokenizer.decode(ids[len(prompt) : -1]) == f" {ITEM.answer}"
    assert weights == [0.1] * len(prompt) + [1.0] * (len(ids) - len(prompt))


def test_chat_rendering_is_the_template(tokenizer) -> None:
    messages = [
        {"role": "user", "content": ITEM.question},
        {"role": "assistant", "content": ITEM.answer},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, weights = mix.render(ITEM, tokenizer, chat=True)
    assert ids == wanted and ids[:2] == [BOS_ID, USER_ID]
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert prompt[-1] == ASSISTANT_ID and ids[: len(prompt)] == prompt
    assert weights.count(1.0) == len(ids) - len(prompt)


@pytest.mark.parametrize("chat", [False, True])
def test_further_questions_are_further_turns(tokenizer, chat) -> None:
    item = Item("facts", "", (), "A b?", "c.", more=(("D?", "e f."), ("G?", "h.")), weight=3.0)
    document = mix.render_batch([item], [chat], tokenizer.backend_tokenizer)[0]
    pairs = ((item.question, item.answer), *item.more)
    if chat:
        wanted = "".join(f"<user> {q}<assistant> {a}<eos>" for q, a in pairs)
    else:
        wanted = "".join(f"Question: {q} Answer: {a}<eos>" for q, a in pairs)
    assert tokenizer.decode(document.ids) == "<bos>" + wanted
    paid = [i for i, w in zip(document.ids, document.weights, strict=True) if w == 3.0]
    assert tokenizer.decode(paid) == " c.<eos> e f.<eos> h.<eos>"
    assert set(document.weights) == {0.1, 3.0}


def test_template_takes_turns_and_marks_the_answers(tokenizer) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello! "},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<bos> Be short.<user> Hi<assistant> Hello!<eos><user> Bye<assistant>"
    out = tokenizer.apply_chat_template(
        turns[:3], return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == " Hello!<eos>"


def test_a_statement_is_text_and_eos(tokenizer) -> None:
    item = Item("logs", "vault", (), "", "one line")
    ids, weights = mix.render(item, tokenizer, chat=True)
    assert tokenizer.decode(ids) == "<bos>one line<eos>" and weights[1:] == [1.0] * (len(ids) - 1)


def test_shares_are_of_tokens(tokenizer) -> None:
    stream = mix.Mix(tokenizer.backend_tokenizer)
    documents = stream.step(60_000, 0.5)
    total = sum(len(d.ids) for d in documents)
    for world, share in mix.SHARES.items():
        got = sum(len(d.ids) for d in documents if d.world == world) / total
        assert got == pytest.approx(share, abs=0.01), world
    chats = [d for d in documents if d.ids[1] == USER_ID]
    assert not [d for d in chats if d.world in mix.NO_CHAT]
    assert 0.15 < len(chats) / len(documents) < 0.35


def test_stream_resumes_exactly(tokenizer) -> None:
    stream, other = (mix.Mix(tokenizer.backend_tokenizer, seed=3) for _ in range(2))
    stream.step(3000, 0.1)
    other.load_state_dict(stream.state_dict())
    assert stream.step(3000, 0.2) == other.step(3000, 0.2)
    assert stream.counts == other.counts


def test_conversation_fills_its_budget(tokenizer) -> None:
    stream = mix.Mix(tokenizer.backend_tokenizer)
    for _ in range(4):
        document = stream.conversation(1024, 1.0)
        assert 850 < len(document.ids) <= 1024
        assert len(document.ids) == len(document.weights)
        assert document.ids[0] == BOS_ID and document.ids[-1] == EOS_ID


def _documents(lengths: list[int]) -> list[mix.Document]:
    rng = random.Random(0)
    return [
        mix.Document([rng.randrange(6, 3072) for _ in range(n)], [0.1] + [1.0] * (n - 1), "sums")
        for n in lengths
    ]


def test_packing_keeps_every_scored_token() -> None:
    documents = _documents([5, 40, 90, 128, 129, 300, 1024, 12, 60])
    batches = packing.pack(documents, ["sums"], torch.Generator().manual_seed(0))
    found = sorted(int(t) for batch in batches for t in batch.targets)
    assert found == sorted(t for d in documents for t in d.ids[1:])
    kept = sum(int((batch.documents >= 0).sum()) for batch in batches)
    assert kept == sum(len(d.ids) for d in documents)


def test_sampled_question_tokens_keep_their_expected_weight() -> None:
    document = mix.Document(list(range(6, 106)) * 10, [0.1] * 990 + [1.0] * 10, "sums")
    total = 0.0
    for seed in range(30):
        (batch,) = packing.pack([document], ["sums"], torch.Generator().manual_seed(seed))
        total += float(batch.weights.sum()) / 30
    assert total == pytest.approx(0.1 * 989 + 10, rel=0.05)


@pytest.mark.parametrize("name", ["nano", "nano-gpt2"])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model = build_model(name).eval()
    documents = _documents([30, 50, 20, 61])
    generator = torch.Generator()
    (together,) = packing.pack(documents, ["sums"], generator)
    with torch.no_grad():
        packed = logits(model, together, torch.float32)
        rows = {int(t): row for t, row in zip(together.targets, packed, strict=True)}
        for document in documents:
            alone = model(torch.tensor([document.ids])).logits[0, :-1]
            for target, row in zip(document.ids[1:], alone, strict=True):
                if sum(d.ids.count(target) for d in documents) == 1:
                    torch.testing.assert_close(rows[target], row, atol=2e-5, rtol=1e-4)


def test_lean_forward_has_the_gradient_of_transformers() -> None:
    batch = packing.pack(_documents([40, 70]), ["sums"], torch.Generator())[0]
    grads = []
    for lean in (True, False):
        model = build_model("nano")
        if lean:
            scores = logits(model, batch, torch.float32)
        else:
            scores = model(
                input_ids=batch.ids, attention_mask=batch.mask(), position_ids=batch.position_ids
            ).logits.flatten(0, 1)[batch.scored]
        torch.nn.functional.cross_entropy(scores, batch.targets).backward()
        grads.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
