"""The matcher against its slow twin: a scan of the whole text, character by character."""

from hypothesis import example, given
from hypothesis import strategies as st

from scheduler_svc.frontend.stop_strings import StopMatcher

letters = st.text("ab", max_size=30)


def scan(text, stops):
    """(text before the match, the match), by definition: the first to complete, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def feed(chunks, stops):
    matcher = StopMatcher(stops)
    out = []
    for chunk in chunks:
        out.append(matcher.push(chunk))
        if matcher.matched is not None:
            break
    return out, matcher


@given(
    st.lists(letters, max_size=10), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4)
)
@example(["aab", "aaab"], ["aaa", "ab"])
@example(["a", "b", "a", "b", "b"], ["abb", "b"])
def test_equals_scanning_the_whole(chunks, stops):
    out, matcher = feed(chunks, stops)
    expected, matched = scan("".join(chunks), stops)
    assert ("".join(out) + matcher.finish(), matcher.matched) == (expected, matched)


@given(
    st.lists(letters, max_size=10), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_holds_back_no_more_than_may_become_a_match(chunks, stops):
    out, matcher = feed(chunks, stops)
    if matcher.matched is None:
        text = "".join(chunks)
        held = text[len("".join(out)) :]
        assert held == max((s[:n] for s in stops for n in range(len(s)) if text.endswith(s[:n])), key=len)


def test_plain_text_passes_at_once():
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("no line") == "no line"
    assert matcher.push("\n") == ""
    assert matcher.push("next") == "\nnext"
    assert matcher.push("\n\nrest") == ""
    assert matcher.matched == "\n\n"
    assert matcher.finish() == ""
