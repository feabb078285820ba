"""Molmo 2's grammar, points and tracks in markup: `<points coords="...">` and `<tracks coords="...">`."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from .base import Coded, DecodeError, Found, Grammar, check_attributes
from .molmo import attributes, label_reason, label_text, lost_attributes, outer_span, scan_tags

__all__ = ["Molmo2Grammar"]

_GROUP = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)((?: [0-9]{1,9} [0-9]{3,4} [0-9]{3,4})++)")
_TRIPLE = re.compile(r" ([0-9]+) ([0-9]+) ([0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Molmo2Grammar:
    """`<points coords="1 1 523 044 2 600 100;2 3 010 020">a</points>`: image (from 1), then number, x and y of points.

    Tracks are `<tracks coords="0.0 1 259 340;1.0 1 138 427">a</tracks>`: seconds, then number, x and y of objects.
    Consecutive points with the same label make one tag, and so do tracks with increasing numbers. The number is the
    identity of a region; a point without one gets the number of the previous point plus one. Coordinates have at least
    three digits. A time with a decimal instead of an image is a time in a video: such a point is read as a track of
    one point. Points are written in the order given; Molmo 2's training data has them sorted by x, then y, after
    rounding. `&`, `<`, `>` and quotes in labels become entities, which are read back.

    Args:
        image_separator: Text between images or times, ";" or a tab; both are read.
        separator: Text between tags.
    """

    image_separator: str = ";"
    separator: str = " "

    def __post_init__(self) -> None:
        if self.image_separator not in (";", "\t"):
            raise ValueError(f"`image_separator` must be ';' or a tab, got {self.image_separator!r}.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of region that can be written."""
        return ("point", "track")

    def write(self, regions: Sequence[Coded]) -> str:
        """See [`Grammar`]."""
        texts = []
        for region in regions:
            check_attributes(region)
        for (kind, label), run in groupby(regions, key=lambda region: (region.kind, region.label)):
            if kind not in self.kinds:
                raise ValueError(f"A {kind} cannot be written: the format has {', '.join(self.kinds)}.")
            name = label_text(label, kind)
            members = list(run)
            parts = self._points(members) if kind == "point" else self._tracks(members)
            texts += [f'<{kind}s coords="{coords}">{name}</{kind}s>' for coords in parts]
        return self.separator.join(texts)

    def _points(self, run: Sequence[Coded]) -> Iterator[str]:
        """Yield the coordinates of points with one label."""
        count, groups = 0, []
        for image, points in groupby(run, key=lambda region: region.image):
            texts = [str(image + 1)]
            for point in points:
                count = count + 1 if point.identity is None else point.identity
                texts.append(f"{count} {point.codes[0]:03d} {point.codes[1]:03d}")
            groups.append(" ".join(texts))
        yield self.image_separator.join(groups)

    def _tracks(self, run: Sequence[Coded]) -> Iterator[str]:
        """Yield the coordinates of each tag of tracks; a number that does not increase begins another tag."""
        by_time: dict[str, list[str]] = {}
        last = 0
        for track in run:
            if track.image or not len(track.times):
                raise ValueError("The format writes tracks with times, of one video.")
            number = last + 1 if track.identity is None else track.identity
            if by_time and number <= last:
                yield self._joined_times(by_time)
                by_time = {}
            last = number
            times = [f"{time:.1f}" for time in track.times]
            if len(set(times)) != len(times):
                raise ValueError(f"The times of a track must differ by at least 0.1 s, got {tuple(track.times)}.")
            pairs = zip(track.codes[::2], track.codes[1::2], strict=True)
            for time, (x, y) in zip(times, pairs, strict=True):
                by_time.setdefault(time, []).append(f"{number} {x:03d} {y:03d}")
        yield self._joined_times(by_time)

    def _joined_times(self, by_time: dict[str, list[str]]) -> str:
        """Return the coordinates of tracks in the order of time."""
        return self.image_separator.join(" ".join([time, *by_time[time]]) for time in sorted(by_time, key=float))

    def scan(self, text: str) -> tuple[list[Found], list[DecodeError]]:
        """See [`Grammar`]."""
        return scan_tags(text, self._read_tag)

    def lost(self, text: str, target: Grammar) -> list[DecodeError]:
        """See [`ReportsLoss`]."""
        return lost_attributes(text, ("coords",))

    def _read_tag(self, tag: re.Match[str], found: list[Found]) -> str | None:
        """Add the regions of a tag to `found`; returns the reason if it has none."""
        pairs = attributes(tag)
        coords = [match for match in pairs or [] if match[1] == "coords" and not match[2]]
        if len(coords) != 1 or tag[1] == "point":
            return "malformed tag: expected coords once"
        groups, position = [], coords[0].start(3)
        while match := _GROUP.match(tag.string, position, coords[0].end(3)):
            groups.append(match)
            position = match.end() + 1
            if match.end() == coords[0].end(3) or tag.string[match.end()] not in ";\t":
                break
        if not groups or groups[-1].end() != coords[0].end(3):
            return "malformed coords: expected an image or time, then number, x and y in three digits"
        if reason := label_reason(tag[4]):
            return reason
        label = html.unescape(tag[4]) or None
        regions = self._read_tracks(groups, label) if tag[1] == "tracks" else self._read_points(groups, label)
        if isinstance(regions, str):
            return regions
        for index, item in enumerate(regions):
            span = (item.start, item.end)
            found.append(item._replace(outer=outer_span(tag, span, index == 0, index + 1 == len(regions))))
        return None

    def _read_points(self, groups: Sequence[re.Match[str]], label: str | None) -> list[Found] | str:
        """Return the points of a tag, or the reason why it has none."""
        result = []
        for group in groups:
            is_time = "." in group[1]
            if not is_time and int(group[1]) == 0:
                return "malformed coords: images are counted from 1"
            for triple in _TRIPLE.finditer(group.string, group.start(2), group.end(2)):
                number, *codes = map(int, triple.groups())
                span = (triple.start(2), triple.end())
                if is_time:
                    result.append(Found(*span, span, "track", codes, label, 0, number, (float(group[1]),)))
                else:
                    result.append(Found(*span, span, "point", codes, label, int(group[1]) - 1, number))
        return result

    def _read_tracks(self, groups: Sequence[re.Match[str]], label: str | None) -> list[Found] | str:
        """Return the tracks of a tag by number, or the reason why it has none. A span is from first to last point."""
        tracks: dict[int, tuple[list[int], list[float], list[int]]] = {}
        last = -1.0
        for group in groups:
            time = float(group[1])
            if time <= last:
                return "malformed coords: times must increase"
            last = time
            for triple in _TRIPLE.finditer(group.string, group.start(2), group.end(2)):
                number, x, y = map(int, triple.groups())
                codes, times, ends = tracks.setdefault(number, ([], [], [triple.start(2)]))
                if times and times[-1] == time:
                    return f"malformed coords: object {number} occurs twice at {group[1]} s"
                codes += [x, y]
                times.append(time)
                ends.append(triple.end())
        return [
            Found(ends[0], ends[-1], (ends[0], ends[-1]), "track", codes, label, 0, number, tuple(times))
            for number, (codes, times, ends) in sorted(tracks.items())
        ]
