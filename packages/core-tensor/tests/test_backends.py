import core_tensor


def test_the_native_cpu_backend_is_live_for_every_operator():
    live = core_tensor.backends()
    assert live
    assert {name: device["cpu"] for name, device in live.items()} == dict.fromkeys(live, "native")
