from pathlift.capture import capture, check_support
