"""Tokenizer, documents and order of pretraining."""

from __future__ import annotations

from prefopt.training.pretrain import documents_to_ids, short_documents_first, train_tokenizer


def test_some_short_documents_come_first_and_nothing_else_moves() -> None:
    documents = [[1] * length for length in (9, 3, 8, 2, 7, 3)]
    ordered = short_documents_first(documents, short_tokens=3, first=2)
    assert [len(ids) for ids in ordered] == [3, 2, 9, 8, 7, 3]
    assert short_documents_first(documents, short_tokens=0, first=2) == documents


def test_a_long_document_is_cut_into_pieces_that_fit_after_one_eos() -> None:
    tokenizer = train_tokenizer(["a b c d e f"] * 3, vocab_size=260)
    whole = tokenizer("a b c d")["input_ids"]
    pieces = list(documents_to_ids(["a b c d", "a"], tokenizer, max_positions=4))
    assert [token for piece in pieces[:-1] for token in piece] == [*whole, tokenizer.eos_token_id]
    assert all(1 <= len(piece) <= 3 for piece in pieces)
    assert pieces[-1] == [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]


def test_any_text_can_be_encoded() -> None:
    tokenizer = train_tokenizer(["plain words only"], vocab_size=300)
    assert tokenizer.decode(tokenizer("naïve 日本 <|endoftext")["input_ids"]) == "naïve 日本 <|endoftext"
