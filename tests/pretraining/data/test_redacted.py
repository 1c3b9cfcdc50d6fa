"""What may be secret in the name of a stream is in no message."""

import pytest

from elip_models.pretraining.data.streams import redacted


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pipe:curl -H 'Authorization: Bearer secret' https://h/a.tar", "pipe:curl ***"),
        ("pipe:TOKEN=secret curl https://h/a.tar", "pipe:***"),
        ("pipe:'secret' cat", "pipe:***"),
        ("pipe:/bin/cat", "pipe:/bin/cat"),
        ("https://user:sec@re/t?#@h/a.tar", "https://***@h/a.tar"),
        ("https://h:80/a-{0..3}.tar?X-Amz-Signature=secret", "https://h:80/a-{0..3}.tar?***"),
        ("data.train={stream: 'pipe:aws secret', samples: 5}", "data.train={stream: 'pipe:aws ***"),
        ("hf://datasets/a/b@main/x.tar", "hf://datasets/a/b@main/x.tar"),
        ("photos/me@home?.tar", "photos/me@home?.tar"),
        ("https://h/https://u:secret@i/a", "https://h/https://***@i/a"),
        ({"stream": ("s3://k:s@b/x",), "samples": 5}, {"stream": ["s3://***@b/x"], "samples": 5}),
    ],
)
def test_redacted(spec, expected):
    assert redacted(spec) == expected


@pytest.mark.parametrize("text", ["a://", "pipe:", "a://@", "://x:@", "?", "{0..1}"])
def test_long_texts_take_linear_time(text):
    assert isinstance(redacted(text * 200_000), str)
