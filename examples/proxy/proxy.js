// What nginx.conf needs a program for. None of these functions logs anything, and what they throw has no secret in it.

import crypto from 'crypto';
import fs from 'fs';

// contentOf returns what is in a file, without white space around it, or nothing if there is none.
function contentOf(path) {
    try {
        return fs.readFileSync(path, 'utf8').trim();
    } catch (e) {
        return '';
    }
}

// token returns the client's token, from Bearer or from the password of Basic, whatever the user is; or nothing, if it
// has a character that tokens don't have: a line break would add a header to the question to the API server.
function token(r) {
    const header = /^ *(Bearer|Basic) +([A-Za-z0-9._~+\/=-]+) *$/i.exec(r.headersIn.Authorization || '');
    if (!header) {
        return '';
    }
    let token = header[2];
    if (header[1].toLowerCase() === 'basic') {
        const pair = Buffer.from(token, 'base64').toString();
        const colon = pair.indexOf(':');
        token = colon < 0 ? '' : pair.slice(colon + 1);
    }
    return /[^A-Za-z0-9._~+\/=-]/.test(token) ? '' : token;
}

// tokenSHA256 returns what the cache knows a token by.
function tokenSHA256(r) {
    return crypto.createHash('sha256').update(r.variables.token).digest('hex');
}

// connectorURI returns where the API server has the Connector: in this Pod's namespace.
function connectorURI(r) {
    return `/apis/connectors.alauda.io/v1alpha1/namespaces/${process.env.NAMESPACE}/connectors/${r.variables.connector}`;
}

// target returns the Connector's address, without a slash at its end.
function target(r) {
    return contentOf(`/etc/nginx/proxy/${r.variables.connector}.address`).replace(/\/+$/, '');
}

// credential returns the header with the Connector's credential: Basic of username and password, or Bearer of token.
// The Secret's files are read for each request, so that a new one counts as soon as kubelet has brought it.
function credential(r) {
    const dir = `/etc/nginx/credentials/${r.variables.connector}/`;
    const token = contentOf(dir + 'token');
    const header = token ? `Bearer ${token}`
        : `Basic ${Buffer.from(contentOf(dir + 'username') + ':' + contentOf(dir + 'password')).toString('base64')}`;
    return /[\x00-\x1f\x7f]/.test(header) ? '' : header;
}

// inside returns the target's Location as one of this proxy: a path. To another host it leads nowhere, unless the
// server passes such redirects on.
function inside(r) {
    const target = r.variables.target;
    const path = target.replace(/^https?:\/\/[^\/]+/, '');
    const origin = target.slice(0, target.length - path.length);
    let location = r.variables.upstream_http_location || '';
    if (location.startsWith(origin + '/')) {
        location = location.slice(origin.length);
    }
    if (/^\/(?![\/\\])/.test(location)) {
        return location.startsWith(path + '/') ? location.slice(path.length) : '';
    }
    if (/^[a-z][a-z0-9+.-]*:|^[\/\\]/i.test(location)) {
        return r.variables.elsewhere === 'pass' ? location : '';
    }
    return location;
}

export default { token, tokenSHA256, connectorURI, target, credential, inside };
