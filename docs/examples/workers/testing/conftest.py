pytest_plugins = ["bridge.pytest_plugin"]
