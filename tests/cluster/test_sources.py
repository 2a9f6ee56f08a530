"""Passwords in a camera's address: wherever one stands, it does not come by the command line."""

import pytest

from cluster.sources import Address, parse_source
from infra.errors import DataError


@pytest.mark.parametrize(
    "address",
    [
        "rtsp://viewer:sesame@10.0.0.5/stream1",
        "http://10.0.0.5/videostream.cgi?user=viewer&pwd=sesame",
        "http://10.0.0.5/video?PassWord=sesame&rate=0",
        "https://10.0.0.5/live?stream=1&token=sesame",
        "http://10.0.0.5/video.mjpg?loginuse=viewer&loginpas=sesame",
        "rtsp://10.0.0.5/live?api%5fkey=sesame",
        "rtsp://10.0.0.5:554/user=admin_password=sesame_channel=1_stream=0.sdp?real_stream",
        "rtsp://10.0.0.5/live;user=admin;pwd=sesame",
        "rtsp://10.0.0.5/11/USER%3Dadmin%26PASSWORD%3Dsesame",
        "rtsp://10.0.0.5/live/key=open,sesame/1",
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_shown(address, monkeypatch):
    with pytest.raises(DataError, match=r"file:PATH.*env:NAME") as refused:
        parse_source(address, on_command_line=True)
    assert "sesame" not in str(refused.value)
    assert "sesame" not in Address(address).shown
    monkeypatch.setenv("LINE_1", address)
    assert parse_source("env:LINE_1", on_command_line=True) == Address(address)
    assert parse_source(address) == Address(address)  # from a file of cameras


def test_other_parameters_are_a_cameras_own_business():
    for address in (
        "rtsp://10.0.0.5/live?channel=1&subtype=0&user=viewer",
        "rtsp://10.0.0.5/monkey=1/user=viewer_channel=1.sdp",
    ):
        assert parse_source(address, on_command_line=True) == Address(address)


def test_an_address_is_shown_up_to_its_parameters():
    assert Address("rtsp://10.0.0.5:554/ch1/main_stream").shown == (
        "rtsp://10.0.0.5:554/ch1/main_stream"
    )
    assert Address("rtsp://10.0.0.5/live/user=admin_password=a/b").shown == "rtsp://10.0.0.5/live/"
