"""Every rule of the formats is documented, in the order of the checks, and enforced."""

from __future__ import annotations

import base64
import re
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Allocations
from forged_tickets import (
    DECODED,
    FILES,
    OF_CONTENT,
    Change,
    another,
    cases,
    constant,
    good,
    model,
    more,
    statistic,
)
from torch import Tensor, nn

from nni_jackpot import load_sparse, load_ticket, save_sparse, save_ticket
from nni_jackpot.errors import MaskError, TicketError
from nni_jackpot.storage import sparse_checkpoint
from nni_jackpot.storage.formats.rules import Rule
from nni_jackpot.storage.formats.sealed import write_sealed
from nni_jackpot.storage.ticket_format import CLAIM, RULES

PAGE = ROOT / "docs" / "ticket-format.md"
# Written by the first version.
GOLDEN = {
    "ticket": "c-oy(T}TvB6kapyCG&@+f-G!^eqh>W?#_(6A|dsV^i&T%h&zmT?%Y`?cW1VpyQZ#_z0^YmMe4p3L4^IhrPM<rCPkPANrDfFKQ9#+5+no_MBSOu+z=z0mpS)4=Y03O-#OO`1KyWq6eWoX)F6S1!c=FO(-5_!EK*4f)Pf09&17RtD^A;nWyY9lo{cfcG6^;bJ<(JW+AX#pa{liuHsa08S&g)(Fb!jjp0FSZgBU{z>}KepjRFf;p5<kVStfRA!VZm91G=%9NhI7O_#3ZkS&2VMBdm}|$V)Vir>#uN&GGa?PIgHZ!%Ss}!u^}hd_q@X!b0AwX~uCp$<X#HsSBYMp{#rG-$Fw^ALmzbkdK39+`Z2xkQg={!?L}6D4j7)!;I5`LDRo%RV`H_v-w4>FuiV#nMo=tB&ZqN3Q5y}W6iHMOd<(xrR<rsvKhVr8+&D8@4?g?AWEKP0<Q`Zf_fDSBZMMA$4JL2hGJ9=1Bt8Bp{hkS5g{OQnl51>%!vXP0jFv@6a?y<!#J#Gp}T<IEa=|VM;O*0fjhV;kXgptQcKruOl%5rtP9gtcL_r)#;?mEtYx76ltcQ>0sf0aVgcuFRo=+fB>>^I478gCG~qavOOMN)hTbd3t~W*^yS{5^_wB-~9adMObMg3-r+4hOp8nVBzNNk|Q{8=U59emahG$;(1P8R-&5mfn$<8h=0}`zbUkBnlH&1*%cj^f2sj0}tJ{|mM*YCZ*W4fZWLp(b4{8sSt&*1hkVOZHv^uBCvPu=Wj*)wCZG<kk#raRZPI62&#J(IfoZvVu^g~h)4(N|*V()_j`{j=X5mCH3#Z4br=xdZp+7vzU>I(Q>cR4|@B^d``#m)E6Ve3%;y1WHQUrcqOEVeyu&#kC_%@sdp(44k;IvHcglYm4>",
    "sparse": "c-ozlzmD2K5XN1kzdQokD#Z%zt{4BINT?#EOOq-_zQtYx0&HZPyF|zmWy*VmJVNSJH0kpMDO2Ag+-Kv1&7Dt(So&n|4D-`Bv%~(C)jV4ghAUmFSd}Ua$#6@GwaN?Ki)K1nth0Gqk|Eg!<VNSkJWB&I<TM~rmX<m#aYBmqZ}ogSYfo|cb*=FkkYt&u(iQ<hK`~QJ^s}Uba>~buWvMO@vMX9MCUaGv(#>*-Ge0qpk*B}NH)%Rgr|_@RuK110&2YL|g%eexu_7#U6)kjpN{bhIm}J@V-v&G?4fEW=_cYHo>pI8L92-{+&v08E>czlmn9^k|;aWM4juIC6OiLL{<|e}RCO(3Zi%{Z9-yOKV<9dmVd@+c*8^wbpRspF<Mak_fTk3viU-dmUJ>c#>IFitVeK;Ib(p+_xB!w;uL>Tqpm@M?V>_6V5S^wS^M!o$U;8DSj1aX$Yo#zMv6LNg)>97nhBV>mONjYO<V=NaVP)|AB84Pp7E@NRYxGlO^*viXLHvTZuGg0S8+(nTd<&H69ab`eX2gAXT{boQbRV+HU<&$^Dhworr*pVUrgMoT5&`Z_pS*PbM^v<%bp<es`4(*}e&^`2egdFq+@}Q5<H8g|1K;NJ{Xb0B5<<+dm_o(I8&#ukavE37ywIidh&fT@XejL61`updnWnEo80Ht%H7y",
}


def test_the_page_states_every_rule_in_the_order_of_the_validator() -> None:
    rows = re.findall(r"^\| *(\d+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    expected = [*enumerate(RULES, 1), *enumerate(sparse_checkpoint.RULES, 1)]
    assert rows == [(str(number), rule.text) for number, rule in expected]


def test_there_is_a_forgery_for_every_rule() -> None:
    assert {*FILES, *OF_CONTENT, *DECODED, CLAIM} == set(RULES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forged.ticket"


@pytest.fixture
def untouched() -> Iterator[nn.Module]:
    """The base; the test fails if it changes."""
    base = model()
    yield base
    assert equal(base.state_dict(), model().state_dict())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("rule", "change"), cases(FILES))
def test_files_that_break_a_rule_are_refused(
    path: Path, tmp_path: Path, rule: Rule, change: Callable[[bytes], bytes]
) -> None:
    path.write_bytes(change(good(tmp_path).sealed()))
    with pytest.raises(TicketError, match=re.escape(rule.text)):
        load_ticket(path)


@pytest.mark.parametrize(("rule", "change"), cases(OF_CONTENT))
def test_tickets_that_break_a_rule_are_refused_before_a_model_is_looked_at(
    path: Path, tmp_path: Path, rule: Rule, change: Change
) -> None:
    forged = good(tmp_path)
    change(forged)
    path.write_bytes(forged.sealed())
    with pytest.raises(TicketError, match=re.escape(rule.text)) as raised:
        load_ticket(path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(("rule", "change"), cases(DECODED))
def test_tickets_that_decode_to_what_none_holds_change_nothing(
    path: Path, tmp_path: Path, untouched: nn.Module, rule: Rule, change: Change
) -> None:
    forged = good(tmp_path)
    change(forged)
    path.write_bytes(forged.sealed())
    with pytest.raises(TicketError, match=re.escape(rule.text)):
        load_ticket(path).apply(untouched)


def test_the_forgeries_of_the_tests_are_tickets_but_for_their_changes(path: Path, tmp_path: Path) -> None:
    path.write_bytes(good(tmp_path).sealed())
    ticket, expected = load_ticket(path), load_ticket(tmp_path / "good.ticket")
    assert (ticket.coded, ticket.base, ticket.metadata) == (expected.coded, expected.base, expected.metadata)
    ticket.apply(model())


def peak(run: Callable[[], object]) -> int:
    """Return the peak memory of Python and NumPy during a run in bytes, plus the largest tensor's size."""
    tracemalloc.start()
    try:
        with Allocations() as allocations:
            run()
        return tracemalloc.get_traced_memory()[1] + allocations.largest
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "change",
    [
        another("fc", "_output_0", shape=[2**31, 2], ones=0),
        constant(shape=[2**32], ones=2**32),
        constant(shape=[2**31], ones=1, blocks=[2**31]),
        statistic("bn1.running_mean", ["float32", [2**50]]),
    ],
)
def test_what_is_said_to_be_large_takes_no_memory(
    path: Path, tmp_path: Path, untouched: nn.Module, change: Change
) -> None:
    forged = good(tmp_path)
    change(forged)
    path.write_bytes(forged.sealed())

    def apply() -> None:
        with pytest.raises((TicketError, MaskError)):
            load_ticket(path).apply(untouched)

    assert peak(apply) < 10**6


def test_masks_of_outputs_that_are_kept_take_no_memory(path: Path, tmp_path: Path) -> None:
    forged = good(tmp_path)
    another("fc", "_output_0", shape=[2**32], ones=2**32)(forged)
    path.write_bytes(forged.sealed())
    assert peak(lambda: load_ticket(path).apply(model())) < 10**6


@pytest.mark.parametrize("change", [constant(shape=[2**32]), another("fc", "_output_0", shape=[2**28], ones=1, blocks=[2**28])])  # fmt: skip
def test_masks_that_no_model_bounds_are_bounded_by_the_file(
    path: Path, tmp_path: Path, change: Change
) -> None:
    forged = good(tmp_path)
    change(forged)
    path.write_bytes(forged.sealed())
    ticket = load_ticket(path)

    def decode() -> None:
        with pytest.raises(TicketError, match=re.escape(CLAIM.text)):
            _ = ticket.masks

    assert peak(decode) < 10**6


@pytest.mark.parametrize("value", ["[]", '{"":0}', "0", '""', '"\\ud83d\\ude00"'])
@pytest.mark.parametrize("size", [10**4, 10**6])
def test_text_takes_no_more_than_twice_the_file(path: Path, tmp_path: Path, value: str, size: int) -> None:
    forged = good(tmp_path)
    more(f"[{','.join([value] * (size // len(value)))}]")(forged)
    path.write_bytes(forged.sealed())

    def load() -> None:
        with suppress(TicketError):
            load_ticket(path)

    assert peak(load) < 2 * path.stat().st_size + 6 * 2**20


def test_a_sparse_checkpoint_makes_no_more_than_its_bytes_bound(path: Path) -> None:
    whole = {"dtype": "bool", "shape": [2**32], "ones": 0}
    empty = {"kept.w": torch.zeros(0), "mask.w": torch.zeros(0, dtype=torch.uint8)}
    for described in (whole, whole | {"blocks": [2**32]}, whole | {"shape": [2**13, 2**13]}):
        write_sealed(path, sparse_checkpoint.KIND, 1, {"w": described}, empty)

        def load() -> None:
            with pytest.raises(TicketError, match=re.escape(sparse_checkpoint.CLAIM.text)):
                load_sparse(path)

        assert peak(load) < 10**6
    many = {
        f"{part}.{i}": tensor
        for i in range(10)
        for part, tensor in (("kept", empty["kept.w"]), ("mask", empty["mask.w"].clone()))
    }
    content = {str(i): whole | {"shape": [2**21]} for i in range(10)}
    write_sealed(path, sparse_checkpoint.KIND, 1, content, many)
    with pytest.raises(TicketError, match=re.escape(sparse_checkpoint.CLAIM.text)):
        load_sparse(path)


@pytest.mark.parametrize("kind", GOLDEN)
def test_what_the_first_version_wrote_is_read_and_written(path: Path, kind: str) -> None:
    raw = zlib.decompress(base64.b85decode(GOLDEN[kind]))
    path.write_bytes(raw)
    first = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 8))
    with torch.no_grad():
        for i, parameter in enumerate(first.parameters()):
            parameter.copy_((torch.arange(parameter.numel()) + i + 1).view(parameter.shape) / 8)
    first[1].running_mean.copy_(torch.arange(4.0) / 4)
    masks = {
        "0": {"weight": (torch.arange(8).view(4, 2, 1, 1) % 3 == 0).float(), "bias": None},
        "2": {
            "weight": torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]).repeat(4, 1).bool(),
            "_input_0": torch.ones(4),
        },
    }
    again = path.with_name("again")
    if kind == "ticket":
        save_ticket(again, masks, first, {"seed": 3})
        load_ticket(path).apply(first)
    else:
        save_sparse(again, first, masks)
        state = load_sparse(path)
        first.load_state_dict(state)
    assert again.read_bytes() == raw
    for module in ("0", "2"):
        weight = first.get_submodule(module).weight
        assert torch.equal(weight != 0, masks[module]["weight"].bool())
