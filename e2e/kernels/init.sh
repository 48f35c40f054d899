#!/bin/busybox sh
# The first process of the kernel that is tried: runs the driver, then its tests, and ends the machine. What it says of
# itself begins with "kernels:". The output of both goes to the console, as the kernel's last words would.
export PATH=/bin HOME=/ TMPDIR=/tmp

# The root directory of an initramfs cannot be left with pivot_root(2), as renderers leave theirs: a tmpfs becomes it.
if [ ! -e /moved ]; then
	/bin/busybox --install -s /bin
	mkdir /new
	mount -t tmpfs -o mode=755 root /new
	cp -a /bin /etc /init /driver* /src /new
	mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp /new/var/lib/kubelet/pods
	touch /new/moved
	exec switch_root /new /init
fi

# As on a node: cgroup v2 alone, whose memory controller counts, and mounts that spread.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mount --make-rshared /
ln -s /run /var/run
chmod 1777 /tmp
ip link set lo up

echo "kernels: Linux $(uname -r)"
/driver --node-name=node
echo "kernels: the driver ended with $?"
if [ -e /driver.test ]; then
	cd /src
	/driver.test -test.v -test.parallel=1 -test.timeout=0 -test.run="$(cat /etc/tests)"
	echo "kernels: the tests ended with $?"
fi
poweroff -f
