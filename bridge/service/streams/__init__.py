"""What each client is sent, and when: the session of a connection, and the hub that all of them share."""
